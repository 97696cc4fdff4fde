"""Runs that stand still, and runs whose numbers are not finite."""

import ctypes
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from outcome import Outcome, Progress
from subject import Subject, steps, steps_done

from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.data.batches import Batches
from jaxlora.training import loop

_LIMIT_S = 5


def stand_still(subject: Subject, say: Progress) -> Outcome:
    """A data source, a save and a step that never end: status 75 and a file with all stacks."""
    cases: dict[str, Callable[[], None]] = {
        "data": lambda: _hang(Batches, "batch", 8),
        "save": lambda: _hang(CheckpointStore, "_write", 3),
        "step": _hang_step,
    }
    failures = []
    for phase, prepare in cases.items():
        folder = subject.root / f"stands-{phase}"
        ended = subject.start(folder, prepare=lambda _, p=prepare: p(), stall_timeout=_LIMIT_S)
        written = [path.read_text() for path in folder.glob("stall-*.txt")]
        if ended.status != 75 or len(written) != 1 or f"in phase {phase}" not in written[0]:
            failures.append(f"{phase}: status {ended.status}: {ended.output[-300:]}")
        ended = subject.start(folder)
        found = subject.check(folder, finished=True) if ended.status == 0 else [ended.output[-300:]]
        failures += [f"{phase}: {each}" for each in found]
        say(f"stands still: {phase}, {len(failures)} failures")
    law = "a run that stands still ends with status 75 and all stacks, and continues the same"
    detail = f"{', '.join(cases)}; stall_timeout {_LIMIT_S} s"
    return Outcome(law, len(cases) - len(failures), len(cases), detail, tuple(failures))


def _hang(owner: Any, name: str, nth: int) -> None:
    """Makes the nth call of a function last for ever."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any) -> Any:
        if next(calls) == nth:
            time.sleep(600)
        return function(*arguments)

    setattr(owner, name, call)


def _hang_step() -> None:
    """The fifth step sleeps inside C, as a collective does whose peer is stuck."""
    make = loop.make_train_step

    def made(*arguments: Any) -> Any:
        step, calls = make(*arguments), itertools.count(1)

        def call(*arguments: Any) -> Any:
            if next(calls) == 5:
                ctypes.CDLL(None).sleep(600)
            return step(*arguments)

        return call

    loop.make_train_step = made


def leave_the_finite(subject: Subject, trials: int, say: Progress) -> Outcome:
    """NaN and inf in a batch at some step: status 3, the state before it saved, rows named."""
    failures = []
    for number in range(trials):
        folder = subject.root / f"nan-{number}"
        step, value = subject.rng.randint(1, 11), subject.rng.choice([np.nan, np.inf])
        ended = subject.start(folder, prepare=lambda _, s=step, v=value: _poison(s, v))
        wrong = []
        if ended.status != 3 or f"step {step + 1}: loss" not in ended.output:
            wrong.append(f"status {ended.status}: {ended.output[-300:]}")
        if "rows.jsonl:" not in ended.output.partition("not finite")[2]:
            wrong.append(f"names no rows: {ended.output[-300:]}")
        if max(steps(folder), default=0) != step or steps_done(folder) != step:
            wrong.append(f"saved {steps(folder)}, done {steps_done(folder)}")
        wrong += subject.check(folder, finished=False)
        failures += [f"step {step + 1}, {value}: {each}" for each in wrong]
        say(f"not finite: {number + 1} of {trials}, {len(failures)} failures")
    law = "NaN or inf: status 3 before the update, step and rows named, the state before it saved"
    return Outcome(law, max(trials - len(failures), 0), trials, "", tuple(failures))


def _poison(step: int, value: float) -> None:
    make = Batches.batch

    def batch(self: Batches, number: int, rows: Any = None) -> Any:
        arrays = make(self, number, rows)
        if self.shuffle and number == step:
            arrays["weights"] = arrays["weights"] * np.float32(value)
        return arrays

    Batches.batch = batch  # type: ignore[method-assign]
