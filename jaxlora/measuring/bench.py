"""The train step of a configuration, timed on this machine with its own weights and data."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.measuring.memory import Memory, measure_memory
from jaxlora.parallel import processes
from jaxlora.planning.flops import flops_per_token
from jaxlora.planning.hardware import hardware_of
from jaxlora.planning.program import make_program
from jaxlora.planning.remat import choose
from jaxlora.training.setup import Plan, make_plan
from jaxlora.training.state import (
    init_optimizer,
    load_weights,
    make_tx,
)
from jaxlora.training.step import make_eval_step, make_train_step

WARM_UP = 2
LEAST_STEPS, MOST_STEPS, ENOUGH_S = 5, 50, 15.0
_FORWARD_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a configuration reaches on this machine.

    Attributes:
      device: kind of the devices, and `devices` how many.
      steps: timed ones.
      step_s, step_worst_s: median and slowest step, data included.
      tokens_per_s: tokens trained on or read, padding not counted; `trained_per_s` those with a
        loss.
      flops_per_token: by formula, 4 for each frozen weight, 6 for each trained one, attention
        between tokens that see each other.
      peak_flops_per_s: of all devices by their data sheets, 0 where unknown; `matmul_flops_per_s`
        what one large product reached here.
      seconds: of the median step, by what it was spent on.
      compile_s, load_s: once for a run.
      memory: of one device.
    """

    device: str
    devices: int
    dtype: str
    steps: int
    step_s: float
    step_worst_s: float
    tokens_per_s: float
    trained_per_s: float
    flops_per_token: float
    peak_flops_per_s: float
    matmul_flops_per_s: float
    seconds: Mapping[str, float]
    compile_s: float
    load_s: float
    memory: Memory

    @property
    def flops_per_s(self) -> float:
        """Useful arithmetic."""
        return self.tokens_per_s * self.flops_per_token

    @property
    def mfu(self) -> float | None:
        """Share of the data sheet's peak, None where that is unknown."""
        return self.flops_per_s / self.peak_flops_per_s if self.peak_flops_per_s else None

    @property
    def matmul_share(self) -> float:
        """Share of what a large product reaches here."""
        return self.flops_per_s / self.matmul_flops_per_s

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        shares = {"flops_per_s": self.flops_per_s, "mfu": self.mfu}
        return dataclasses.asdict(self) | shares | {"matmul_share": self.matmul_share}


def bench(
    config: Config, *, steps: int | None = None, say: Callable[[str], None] = lambda text: None
) -> Measured:
    """Trains some steps and forgets them; the output folder is not touched.

    Args:
      config: the run.
      steps: how many to time; None: as many as fit into some seconds.
      say: told what is done at the moment.

    Raises:
      UserError: what `train` would refuse before its first step, or a run of several processes.
    """
    if processes.count() > 1:
        raise UserError("bench measures one process; run it on one machine.")
    if steps is not None and steps < 1:
        raise UserError(f"--steps: {steps}; expected 1 or more.")
    started = time.perf_counter()
    plan = make_plan(config, say)
    with jax.default_matmul_precision(derived.matmul_precision(config) or "default"):
        choose(plan, say)
    subject = _Subject(plan)
    load_s = time.perf_counter() - started
    say("compiling")
    started = time.perf_counter()
    subject.step(0)
    compile_s = time.perf_counter() - started
    say("measuring")
    for number in range(1, 1 + WARM_UP):
        subject.step(number)
    timed = _timed(subject, steps)
    memory = measure_memory(subject.program())
    forward_s = subject.forward_s()
    tokens = sum(each.tokens for each in timed)
    wall_s = sum(each.whole_s for each in timed)
    length = sum(each.squares for each in timed) / max(tokens, 1)
    devices, matmul = jax.devices(), matmul_flops_per_s(subject.dtype)
    peak = hardware_of(devices[0]).flops_per_s
    return Measured(
        device=devices[0].device_kind,
        devices=len(devices),
        dtype=jnp.dtype(subject.dtype).name,
        steps=len(timed),
        step_s=statistics.median(each.whole_s for each in timed),
        step_worst_s=max(each.whole_s for each in timed),
        tokens_per_s=tokens / wall_s,
        trained_per_s=sum(each.trained for each in timed) / wall_s,
        flops_per_token=flops_per_token(make_program(config, devices), max(round(length), 1)).model,
        peak_flops_per_s=peak * len(devices),
        matmul_flops_per_s=matmul * (len(devices) if peak else 1),
        seconds=_shares(timed, forward_s),
        compile_s=compile_s,
        load_s=load_s,
        memory=memory,
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    data_s: float
    transfer_s: float
    device_s: float
    tokens: int
    trained: float
    squares: float  # sum over the sequences of length squared

    @property
    def whole_s(self) -> float:
        return self.data_s + self.transfer_s + self.device_s


class _Subject:
    """The arrays and programs of a run that is measured."""

    def __init__(self, plan: Plan):
        config, model = plan.config, plan.model
        self.plan, self.dtype = plan, model.transformer.dtype
        self.trainable, self.frozen = load_weights(config, model)
        optimizer, _ = make_tx(config, self.trainable, model.specs, plan.total_steps)
        self.opt_state = init_optimizer(optimizer, self.trainable, model.placement)
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        like = (self.trainable, self.opt_state)
        self._train: Any = make_train_step(model.transformer, model.targets, optimizer, key, like)
        self._forward = make_eval_step(model.transformer, model.targets, self.trainable)

    def program(self) -> Any:
        """Returns the compiled step; it cannot be called, as its int4 arguments have a layout."""
        batch = self.plan.model.placement.batch(self.plan.batches.batch(0))
        state = (self.trainable, self.opt_state)
        return self._train.lower(*state, self.frozen, batch, np.int32(0)).compile()

    def step(self, number: int) -> _Step:
        """Does one step as training does it."""
        precision = derived.matmul_precision(self.plan.config) or "default"
        start = time.perf_counter()
        arrays = self.plan.batches.batch(number)
        made = time.perf_counter()
        batch = jax.block_until_ready(self.plan.model.placement.batch(arrays))
        there = time.perf_counter()
        with jax.default_matmul_precision(precision):
            self.trainable, self.opt_state, metrics = self._train(
                self.trainable, self.opt_state, self.frozen, batch, np.int32(number)
            )
        jax.block_until_ready((self.trainable, metrics))
        done = time.perf_counter()
        lengths = sequence_lengths(arrays["segment_ids"])
        return _Step(
            made - start,
            there - made,
            done - there,
            int(lengths.sum()),
            float(arrays["weights"].sum()),
            float((lengths.astype(np.float64) ** 2).sum()),
        )

    def forward_s(self) -> float:
        """Returns the median seconds of a forward pass over a step's rows."""
        batch = self.plan.model.placement.batch(self.plan.batches.batch(0))
        times = []
        for _ in range(_FORWARD_STEPS + 1):
            start = time.perf_counter()
            jax.block_until_ready(self._forward(self.trainable, self.frozen, batch))
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def sequence_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Returns the lengths of the sequences in rows of segment ids, 0 being padding.

    >>> sequence_lengths(np.array([[1, 1, 2, 0], [1, 1, 1, 1]])).tolist()
    [2, 1, 4]
    """
    rows = segment_ids.reshape(-1, segment_ids.shape[-1])
    counts = [np.bincount(row)[1:] for row in rows]
    lengths = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    return lengths[lengths > 0]


def matmul_flops_per_s(dtype: Any) -> float:
    """Returns what the product of two large square matrices reaches on one device."""
    size = 4096 if jax.default_backend() != "cpu" else 1024
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    best, count = float("inf"), 10
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            last = product(a)
        jax.block_until_ready(last)
        best = min(best, (time.perf_counter() - start) / count)
    return 2 * size**3 / best


def _timed(subject: _Subject, steps: int | None) -> list[_Step]:
    timed: list[_Step] = []
    started = time.perf_counter()
    while len(timed) < (steps or MOST_STEPS):
        timed.append(subject.step(1 + WARM_UP + len(timed)))
        spent = time.perf_counter() - started
        if steps is None and len(timed) >= LEAST_STEPS and spent > ENOUGH_S:
            break
    return timed


def _shares(timed: list[_Step], forward_s: float) -> dict[str, float]:
    """Median seconds of a step by what they went into; the forward pass was timed by itself."""
    device_s = statistics.median(each.device_s for each in timed)
    forward_s = min(forward_s, device_s)
    return {
        "data": statistics.median(each.data_s for each in timed),
        "transfer": statistics.median(each.transfer_s for each in timed),
        "forward": forward_s,
        "backward and optimizer": device_s - forward_s,
    }
