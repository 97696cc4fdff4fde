"""SIGTERM, Ctrl-C and SIGUSR1 in every phase of a run: nothing that was trained is lost."""

import collections
import signal
from collections.abc import Callable

import jax
from forked import Aim, Windows
from outcome import Outcome, Progress
from subject import Subject, steps, steps_done

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
# Each run is stopped five times; compiling and exporting come once a start.
PHASES = (
    ("setup", "compile", "step", "eval", "export"),
    ("data", "save", "write", "eval", "export"),
    ("restore", "other", "step", "data", "save"),
)


def signal_runs(subject: Subject, count: int, say: Progress) -> Outcome:
    """Stops runs five times each in named phases, continues them, and compares their ends.

    Args:
      subject: the run.
      count: signals that are sent, at least.
      say: prints.
    """
    failures: list[str] = []
    sent: collections.Counter[str] = collections.Counter()
    waits = []
    for chain in range(count):
        if sum(sent.values()) >= count:
            break
        folder = subject.root / f"stopped-{chain}"
        for phase in PHASES[chain % len(PHASES)]:
            number = subject.rng.choice(list(CODES))
            ended = subject.start(folder, _aim(subject, phase, number), _no_cache(phase))
            if ended.after_s is None or ended.status == 0:
                continue  # the phase did not come any more, or the end was faster
            sent[phase] += 1
            waits.append(ended.after_s)
            name = f"run {chain}: {signal.Signals(number).name} in {phase}"
            # Before `train` has begun the signal itself ends the process: to a shell 128 + number.
            by_signal = phase == "setup" and ended.status == -number
            if ended.status != CODES[number] and not by_signal:
                failures.append(f"{name}: status {ended.status}: {ended.output[-300:]}")
            saved, done = max(steps(folder), default=0), steps_done(folder)
            if saved < done:
                failures.append(f"{name}: {done} steps done, {saved} saved")
        ended = subject.start(folder)
        found = subject.check(folder, finished=True) if ended.status == 0 else [ended.output[-300:]]
        failures += [f"run {chain}: {each}" for each in found]
        say(f"signals: run {chain + 1}, {sum(sent.values())} of {count} sent, {len(failures)} bad")
    trials = sum(sent.values())
    where = ", ".join(f"{count} in {phase}" for phase, count in sent.most_common())
    slowest = f"longest from signal to end {max(waits, default=0):.1f} s"
    law = "a signal: status 143, 130 or 138, lost steps 0, continued run bit-identical"
    return Outcome(law, max(trials - len(failures), 0), trials, f"{where}; {slowest}", (*failures,))


def _aim(subject: Subject, phase: str, number: int) -> Aim:
    nth = subject.rng.randint(1, 3) if phase in ("step", "data", "write") else 1
    if phase == "eval":
        nth = subject.rng.randint(1, 2)
    usual = subject.usual.get(phase, 1.0)
    return Aim(phase, nth, subject.rng.random(), usual, number)


def _no_cache(phase: str) -> Callable[[Windows], None]:
    """Compiles for real where that is what is to be interrupted."""

    def prepare(windows: Windows) -> None:
        if phase == "compile":
            jax.config.update("jax_compilation_cache_dir", None)

    return prepare
