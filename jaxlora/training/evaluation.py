"""Held-out loss and held-out exact match, during a run or alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxlora.config import derived, settings
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree
from jaxlora.data.batches import Batches
from jaxlora.data.scoring import examples_for_scoring, table_for_scoring
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.scoring import Score, exact_match
from jaxlora.parallel.rules import Placement
from jaxlora.training.setup import Plan, make_plan
from jaxlora.training.state import load_weights
from jaxlora.training.step import make_eval_step, weights

EXACT_MATCH_ROWS = 200  # enough for a standard error below 4 points


def held_out_loss(
    eval_step: Callable[..., Any],
    trainable: Tree,
    frozen: Tree,
    batches: Batches,
    placement: Placement,
) -> float:
    """Returns the mean loss in nats over every trained token of the held-out data, once each."""
    loss_sum = tokens = 0.0
    for number in range(batches.steps_per_epoch):
        batch = placement.batch(batches.batch(number))
        batch_sum, batch_tokens = eval_step(trainable, frozen, batch)
        loss_sum, tokens = loss_sum + float(batch_sum), tokens + float(batch_tokens)
    return loss_sum / tokens if tokens else math.nan


def scoring_examples(plan: Plan) -> list[tuple[list[int], str]]:
    """Returns up to `EXACT_MATCH_ROWS` held-out prompts with their expected answers."""
    config, tokenizer = plan.config, plan.model.tokenizer
    options = settings.data_options(config)
    examples: list[tuple[list[int], str]] = []
    for spec in settings.held_out_specs(config):
        room = EXACT_MATCH_ROWS - len(examples)
        examples += examples_for_scoring(spec, options, tokenizer, room)
    if not config.test_datasets and plan.data.evaluation is not None:
        examples = table_for_scoring(
            plan.data.evaluation, tokenizer, EXACT_MATCH_ROWS, config.eot_tokens
        )
    return examples


def held_out_score(plan: Plan, trainable: Tree, frozen: Tree) -> Score:
    """Generates an answer to every scoring prompt, greedily, and counts the exact ones."""
    return exact_match(
        plan.model.transformer,
        weights(trainable, frozen, plan.model.targets),
        scoring_examples(plan),
        plan.model.tokenizer,
        SamplingOptions(max_new_tokens=plan.config.eval_max_new_tokens),
        batch_size=max(8, derived.eval_rows(plan.config)),
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out results of one set of weights.

    Attributes:
      loss: nats per trained token.
      perplexity: its exponential.
      score: exact matches with their samples; None unless `eval_exact_match`.
    """

    loss: float
    perplexity: float
    score: Score | None


def evaluate(config: Config) -> Evaluation:
    """Scores the model of a configuration (`lora_model_dir` on top) on its held-out data.

    Raises:
      UserError: no held-out data, or anything wrong with configuration, model or data.
    """
    if not derived.has_held_out(config):
        raise UserError("evaluate: no held-out data; set test_datasets or val_set_size.")
    plan = make_plan(config)
    trainable, frozen = load_weights(config, plan.model)
    assert plan.eval_batches is not None
    step = make_eval_step(plan.model.transformer, plan.model.targets)
    loss = held_out_loss(step, trainable, frozen, plan.eval_batches, plan.model.placement)
    score = held_out_score(plan, trainable, frozen) if config.eval_exact_match else None
    return Evaluation(loss, math.exp(min(loss, 700.0)), score)
