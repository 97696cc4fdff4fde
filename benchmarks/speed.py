"""Throughput of several learners in one process, taking turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe
from jaxlora.training.interrupt import Interrupts
from jaxlora.training.loop import Run
from jaxlora.training.phases import Phases
from jaxlora.training.resume import Origin
from jaxlora.training.setup import Plan
from jaxlora.training.state import load_weights

Batch = dict[str, np.ndarray]
WARM_UP_STEPS = 2


class Ours:
    """jaxlora's compiled step, batch by batch.

    Args:
      plan: the run.
    """

    def __init__(self, plan: Plan):
        weights = load_weights(plan.config, plan.model)
        self.run = Run(plan, *weights, Origin(False), Phases(), Interrupts())

    def step(self, batch: Batch) -> float:
        """Takes one optimizer step; returns the mean loss in nats over the trained tokens."""
        state = self.run.state
        state.trainable, state.opt_state, metrics = self.run.train_step(
            state.trainable,
            state.opt_state,
            state.frozen,
            self.run.plan.model.placement.batch(batch),
            jnp.int32(state.step),
        )
        state.step += 1
        return float(metrics["loss"])


@dataclasses.dataclass
class Lane:
    """One learner with its batches and what was measured of it.

    Attributes:
      step: takes a batch, returns its loss.
      batch: gives batch number i.
    """

    step: Callable[[Batch], float]
    batch: Callable[[int], Batch]
    losses: list[float] = dataclasses.field(default_factory=list)
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    cpu_s_per_step: list[float] = dataclasses.field(default_factory=list)
    warm_up_s: float = 0.0

    def turn(self, steps: int) -> tuple[float, float, int]:
        """Takes steps; returns wall and CPU seconds and the real tokens in them."""
        done = len(self.losses)
        batches = [self.batch(done + index) for index in range(steps)]
        wall, cpu = time.monotonic(), time.process_time()
        self.losses += [self.step(batch) for batch in batches]
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        return wall, cpu, sum(int(np.count_nonzero(each["segment_ids"])) for each in batches)


def take_turns(lanes: Mapping[str, Lane], *, rounds: int, steps: int) -> None:
    """Runs A B C A B C ..., after a warm-up that compiles."""
    for lane in lanes.values():
        lane.warm_up_s = lane.turn(WARM_UP_STEPS)[0]
    for _ in range(rounds):
        for lane in lanes.values():
            wall, cpu, tokens = lane.turn(steps)
            lane.tokens_per_s.append(tokens / wall)
            lane.cpu_s_per_step.append(cpu / steps)


def summary(lane: Lane, flops_per_token: float, peak_flops: float) -> dict[str, Any]:
    """Returns what a lane measured; `mfu` is the share of the measured matrix-product peak."""
    median = statistics.median(lane.tokens_per_s)
    return {
        "tokens_per_s": round(median),
        "tokens_per_s_range": [round(min(lane.tokens_per_s)), round(max(lane.tokens_per_s))],
        "cpu_s_per_step": round(statistics.median(lane.cpu_s_per_step), 4),
        "warm_up_s": round(lane.warm_up_s, 2),
        "mfu": round(median * flops_per_token / peak_flops, 4),
    }


def ratio(ours: Lane, theirs: Lane) -> dict[str, float | list[float]]:
    """Returns ours over theirs, round by round: median, least and greatest."""
    pairs = zip(ours.tokens_per_s, theirs.tokens_per_s, strict=True)
    ratios = [a / b for a, b in pairs]
    return {
        "median": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def lora_flops_per_token(cfg: ModelConfig, adapter_size: int, lengths: Sequence[int]) -> float:
    """Returns the model's FLOPs per real token of a LoRA or QLoRA step.

    ``4 (P_linear + P_head) + 3 F_attention + 6 P_lora``: frozen weights need no gradient of their
    own. Attention counts pairs of one example only, the causal half of them.
    """
    linear = sum(spec.size for spec in describe(cfg).values() if spec.kind == "linear")
    head = cfg.vocab_size * cfg.embed_dim
    mean_context = float(np.square(np.asarray(lengths, np.float64)).sum() / np.sum(lengths))
    attention = 2 * cfg.num_layers * cfg.num_heads * cfg.head_dim * mean_context
    return 4 * (linear + head) + 3 * attention + 6 * adapter_size
