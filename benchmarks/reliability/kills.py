"""kill -9 of runs and of the checkpoint store, at instants aimed at windows of the work."""

import collections
import os
import signal
import time
from pathlib import Path

import numpy as np
from forked import Aim, Windows, fork
from outcome import Outcome, Progress
from subject import Subject, kill_at_event, steps_done, watch

from jaxlora.checkpoints.manifest import leaf_paths
from jaxlora.checkpoints.store import CheckpointStore

# What each five kills of a run are aimed at; "any" is any moment of the training.
AIMS = (
    ("write", "write", "delete", "any", "any"),
    ("write", "delete", "write", "any", "export"),
)
_LEAVES = 1 << 16


def kill_runs(subject: Subject, wanted: int, say: Progress) -> list[Outcome]:
    """Kills each run up to five times, continues it, and compares it with the one never killed."""
    fell: collections.Counter[str] = collections.Counter()
    kills, listed, chain, failures, bad = 0, 0, -1, [], []
    while kills < wanted:
        chain += 1
        folder = subject.root / f"killed-{chain}"
        own = 0
        for aim in AIMS[chain % len(AIMS)][: wanted - kills]:
            if own:
                found = subject.check(folder, finished=False)
                bad += [f"run {chain}: {each}" for each in found]
                listed += 1
            window = _kill(subject, folder, aim, chain)
            if window is None:
                break  # it got through
            own += 1
            fell[window] += 1
        kills += own
        ended = subject.start(folder, save_total_limit=1 + chain % 2)
        found = subject.check(folder, finished=True) if ended.status == 0 else [ended.output[-300:]]
        failures += [f"run {chain}: {each}" for each in found]
        say(f"kill -9: run {chain + 1}, {kills} of {wanted} kills, {len(failures)} differences")
    where = ", ".join(f"{count} in {window}" for window, count in fell.most_common())
    good = kills if not failures else 0
    law = "kill -9 anywhere, continue: final adapter, optimizer, metrics bit-identical"
    return [
        Outcome(law, good, kills, f"{chain + 1} runs; {where}", tuple(failures)),
        Outcome(
            "every checkpoint listed after a kill restores to the state of its step",
            listed - len(bad),
            listed,
            "inspections",
            tuple(bad),
        ),
    ]


def _kill(subject: Subject, folder: Path, aim: str, chain: int) -> str | None:
    """Starts or continues a run and kills it; returns in which window, None if it got through."""
    rng, limit = subject.rng, 1 + chain % 2  # with one checkpoint kept each save deletes one
    left = max((11 - steps_done(folder)) // 2, 1)
    if aim == "delete":
        event = rng.randint(1, 12)
        ended = subject.start(
            folder,
            prepare=lambda windows: kill_at_event(windows, "delete", event),
            save_total_limit=limit,
        )
    else:
        target = Aim("write", rng.randint(1, min(left, 2)), rng.random(), subject.usual["write"])
        if aim == "any":
            usual = subject.usual["data"] + subject.usual["step"] + subject.usual["write"]
            target = Aim("data", rng.randint(1, 2 * left), rng.random(), usual)
        if aim == "export":
            target = Aim("export", 1, rng.random(), subject.usual["export"])
        ended = subject.start(folder, target, save_total_limit=limit)
    if ended.status == 0:
        return None
    assert ended.status == -signal.SIGKILL, ended.output[-2000:]
    return ended.window or "other"


def kill_store(subject: Subject, kills: int, say: Progress) -> Outcome:
    """Kills a process that saves without a pause; nothing committed is lost, nothing listed bad."""
    folder = subject.root / "store"
    report = folder.with_suffix(".steps")
    report.write_bytes(b"")
    failures: list[str] = []
    fell: collections.Counter[str] = collections.Counter()
    usual = 0.1
    for number in range(kills):
        windows = Windows()

        # From the first commit on it does nothing but save, seal, rename and delete.
        aim = Aim("write", 2 + number % 2, subject.rng.random() * 1.1, usual)
        event = 0
        if number % 4 == 3:
            event = subject.rng.randint(1, 30)
            aim = Aim("write", 500, 0, 0)

        def work(windows: Windows = windows, number: int = number, event: int = event) -> int:
            watch(windows)
            if event:
                kill_at_event(windows, "delete", event)
            return _save_without_end(folder, report, number)

        ended = fork(work, windows, aim)
        fell[ended.window or "between"] += 1
        usual = windows.mean_s("write") if windows.count("write") > 2 else usual
        if ended.status != -signal.SIGKILL:
            failures.append(f"kill {number}: {ended.output[-300:]}")
        if number % 20 == 19:
            say(f"kill -9 of the store: {number + 1} of {kills}, {len(failures)} failures")
    where = ", ".join(f"{count} in {window}" for window, count in fell.most_common())
    law = "kill -9 of a process that only saves: no committed step lost, none listed that is bad"
    return Outcome(law, kills - len(failures), kills, where, tuple(failures))


def _state(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {"a": rng.standard_normal(_LEAVES).astype("f4"), "count": np.asarray(step, np.int32)}


def _save_without_end(folder: Path, report: Path, seed: int) -> int:
    """Checks what the process before has left, then saves until it is killed."""
    store = CheckpointStore(folder, keep=2)
    committed = max([0, *map(int, report.read_bytes().split())])
    if (store.latest() or 0) < committed:
        print(f"step {committed} was committed and is lost")
        return 1
    if store.on_disk() != store.steps():
        print(f"half a checkpoint: {store.on_disk()} are there, {store.steps()} are whole")
        return 1
    for step in store.steps():
        state, _ = store.restore(step, _state(0))
        left, right = leaf_paths(state), leaf_paths(_state(step))
        if any(np.asarray(left[name]).tobytes() != right[name].tobytes() for name in right):
            print(f"step {step} is listed and is not what was saved")
            return 1
    step, deadline = store.latest() or 0, time.monotonic() + 60
    if step:
        store.restore(step, _state(0))
    with report.open("ab", buffering=0) as file:
        while time.monotonic() < deadline:
            step += 1
            store.save(step, _state(step), {})
            store.wait()
            file.write(f"{step}\n".encode())
    print("was not killed")
    os._exit(1)
