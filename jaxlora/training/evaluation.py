"""Held-out loss, accuracy and exact match, during a run or alone."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlora.config import derived, settings
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree
from jaxlora.data.scoring import examples_for_scoring, table_for_scoring
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.scoring import Score, exact_match
from jaxlora.parallel import processes
from jaxlora.training.labels import Confusion
from jaxlora.training.metrics import Sink, write_all
from jaxlora.training.progress import Display
from jaxlora.training.setup import Plan, make_plan
from jaxlora.training.state import TrainState, load_weights
from jaxlora.training.step import make_eval_step, weights
from jaxlora.training.watchdog import falls_no_more

EXACT_MATCH_ROWS = 200  # enough for a standard error below 4 points


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a model makes of the held-out data.

    Attributes:
      loss: nats per trained token, or per text of a classifier.
      confusion: of a classifier, None for a model of tokens.
    """

    loss: float
    confusion: Confusion | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def metrics(self) -> dict[str, float]:
        """Values for metrics.jsonl."""
        found = {"eval_loss": self.loss}
        return found | ({"eval_accuracy": self.confusion.accuracy} if self.confusion else {})

    def __str__(self) -> str:
        if self.confusion is None:
            return f"held-out loss {self.loss:.4f} (perplexity {self.perplexity:.2f})"
        return (
            f"held-out loss {self.loss:.4f}, accuracy {self.confusion.accuracy:.1%} (always the "
            f"most frequent label: {self.confusion.majority:.1%})"
        )


def held_out(
    eval_step: Callable[..., Any],
    trainable: Tree,
    frozen: Tree,
    plan: Plan,
    between: Callable[[], None] = lambda: None,
) -> HeldOut:
    """Returns loss and, of a classifier, accuracy over the held-out data, every row once.

    `between` is called before each batch.
    """
    batches, placement = plan.eval_batches, plan.model.placement
    assert batches is not None, "there is held-out data"
    loss_sum = tokens = 0.0
    rows = placement.own_rows(batches.rows)
    counts: Any = 0.0
    for number in range(batches.steps_per_epoch):
        between()
        batch = placement.batch(batches.batch(number, rows))
        batch_sum, batch_tokens, confusion = eval_step(trainable, frozen, batch)
        loss_sum, tokens = loss_sum + float(batch_sum), tokens + float(batch_tokens)
        counts = counts + np.asarray(confusion, np.float64)
    loss = loss_sum / tokens if tokens else math.nan
    return HeldOut(loss, Confusion(counts, plan.labels.shown) if plan.labels else None)


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


def held_out_score(
    plan: Plan, trainable: Tree, frozen: Tree, between: Callable[[], None] = lambda: None
) -> Score:
    """Generates an answer to every scoring prompt, greedily, and counts the exact ones."""
    return exact_match(
        plan.model.transformer,
        weights(trainable, frozen, plan.model.targets),
        scoring_examples(plan),
        plan.model.tokenizer,
        SamplingOptions(max_new_tokens=plan.config.eval_max_new_tokens),
        batch_size=max(8, derived.eval_rows(plan.config)),
        between=between,
    )


class Evaluator:
    """Evaluates the states of a run and writes what it finds to screen and sinks.

    Args:
      plan: the run.
      eval_step: compiled.
      display, sinks: where the numbers go.
      between: called before each batch.
      records: lines of metrics.jsonl up to where the run continues.
    """

    def __init__(
        self,
        plan: Plan,
        eval_step: Callable[..., Any],
        display: Display,
        sinks: Sequence[Sink],
        between: Callable[[], None],
        records: Sequence[dict[str, Any]] = (),
    ):
        self._losses = {each["step"]: each["eval_loss"] for each in records if "eval_loss" in each}
        self._plan, self._eval_step = plan, eval_step
        self._display, self._sinks, self._between = display, sinks, between

    def loss(self, state: TrainState) -> dict[str, float]:
        """Evaluates held-out loss and accuracy; nothing without held-out data."""
        if self._plan.eval_batches is None:
            return {}
        started = time.monotonic()
        found = held_out(self._eval_step, state.trainable, state.frozen, self._plan, self._between)
        self._display.pause(time.monotonic() - started)
        self._display.say(str(found))
        write_all(self._sinks, state.step, found.metrics)
        self._losses[state.step] = found.loss
        return found.metrics

    @property
    def stale(self) -> bool:
        """Whether the held-out loss falls no more, and the run is to end then."""
        return falls_no_more([*self._losses.values()], self._plan.config.early_stopping_patience)

    def everything(self, state: TrainState, when: str) -> dict[str, float]:
        """The same, and exact matches if they are asked for."""
        found = self.loss(state)
        if not self._plan.config.eval_exact_match:
            return found
        started = time.monotonic()
        score = held_out_score(self._plan, state.trainable, state.frozen, self._between_answers)
        processes.exchange("answers", True)
        self._display.pause(time.monotonic() - started)
        self._display.say(
            f"held-out exact match {when}: {score.rate:.1%} ({score.correct} of {score.total})"
        )
        write_all(self._sinks, state.step, {"exact_match": score.rate})
        return found | {"exact_match": score.rate}

    def _between_answers(self) -> None:
        # Devices that decode alike need no word of each other: then only this makes processes meet.
        processes.exchange("answers", True)
        self._between()

    def before(self, state: TrainState, first: dict[str, float]) -> dict[str, float]:
        """Numbers from before training; a run that continues has them in its metrics."""
        if "eval_loss" in first and (
            "exact_match" in first or not self._plan.config.eval_exact_match
        ):
            return first
        return self.everything(state, "before training")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out results of one set of weights.

    Attributes:
      held_out: loss and, of a classifier, which labels were taken for which.
      score: exact matches with their samples; None unless `eval_exact_match`.
    """

    held_out: HeldOut
    score: Score | None

    @property
    def loss(self) -> float:
        """Nats per trained token, or per text of a classifier."""
        return self.held_out.loss

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return self.held_out.perplexity

    @property
    def accuracy(self) -> float | None:
        """Share of right labels; None for a model of tokens."""
        return self.held_out.confusion and self.held_out.confusion.accuracy

    def __str__(self) -> str:
        lines = [str(self.held_out)]
        if self.held_out.confusion is not None:
            lines.append(f"right, by label:\n{self.held_out.confusion.table()}")
        if self.score is not None:
            score = self.score
            lines.append(
                f"held-out exact match {score.rate:.1%} ({score.correct} of {score.total})"
            )
        return "\n".join(lines)


def evaluate(config: Config) -> Evaluation:
    """Scores the model of a configuration (`lora_model_dir` on top) on its held-out data.

    Raises:
      UserError: no held-out data, or anything wrong with configuration, model or data.
    """
    if not derived.has_held_out(config):
        raise UserError("evaluate: no held-out data; set test_datasets or val_set_size.")
    plan = make_plan(config)
    trainable, frozen = load_weights(config, plan.model)
    step = make_eval_step(plan.model.transformer, plan.model.targets, trainable)
    found = held_out(step, trainable, frozen, plan)
    score = held_out_score(plan, trainable, frozen) if config.eval_exact_match else None
    return Evaluation(found, score)
