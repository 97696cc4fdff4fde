"""Damage to saved checkpoints: noticed always, and the good one before it is used."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from forked import Windows, fork
from outcome import Outcome, Progress
from subject import Subject

from jaxlora.checkpoints.manifest import DamagedCheckpoint
from jaxlora.checkpoints.store import CheckpointStore


def damage_checkpoints(subject: Subject, trials: int, say: Progress) -> Outcome:
    """Damages one file of the newest of two checkpoints of a run in each trial."""
    say(f"damage: {trials} trials")
    seed, report = subject.rng.random(), subject.root / "damage.txt"

    def work() -> int:
        report.write_text("\n".join(_trials(subject.root / "damaged", trials, seed)))
        return 0

    ended = fork(work, Windows())
    failures = report.read_text().splitlines() if ended.status == 0 else [ended.output[-500:]]
    law = "a damaged checkpoint is never restored; the good one before it is, with a warning"
    kinds = ", ".join(DAMAGES)
    return Outcome(law, trials - len(failures), trials, kinds, tuple(failures))


def _state(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    small = {f"layer-{i}": rng.standard_normal(64).astype("f4") for i in range(8)}
    return small | {"large": rng.standard_normal(4096).astype("f4")}


def _trials(root: Path, trials: int, seed: float) -> list[str]:
    rng, failures = random.Random(seed), []
    with CheckpointStore(root / "good") as store:
        for step in (1, 2):
            store.save(step, _state(step), {"note": step})
    newest = root / "good" / "checkpoint-2"
    files = sorted(path.relative_to(root / "good") for path in newest.rglob("*") if path.is_file())
    warned = _Warnings()
    logging.getLogger("jaxlora").addHandler(warned)
    for number in range(trials):
        folder = root / "trial"
        shutil.copytree(root / "good", folder)
        name, damage = rng.choice(files), rng.choice(list(DAMAGES))
        DAMAGES[damage](folder / name, rng)
        warned.lines.clear()
        if (wrong := _wrong(folder, warned.lines)) is not None:
            failures.append(f"trial {number}: {damage} {name}: {wrong}")
        shutil.rmtree(folder)
    return failures


def _wrong(folder: Path, warnings: list[str]) -> str | None:
    store = CheckpointStore(folder)
    try:
        store.restore(2, _state(0))
        return "restored"
    except DamagedCheckpoint:
        pass
    state, meta = store.restore(None, _state(0))
    if meta != {"note": 1, "step": 1} or any(
        np.asarray(state[name]).tobytes() != array.tobytes() for name, array in _state(1).items()
    ):
        return "another state than that of step 1"
    return None if len(warnings) == 1 else f"{len(warnings)} warnings"


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _changed(path: Path, data: bytes) -> None:
    """Writes other bytes; where the damage has changed none (zeros to zeros), one more."""
    path.write_bytes(data if data != path.read_bytes() else data + b"x")


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"x")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _changed(path, bytes(data))


def _cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    _changed(path, data[: rng.randrange(max(len(data), 1))])


def _zero(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    start = rng.randrange(max(len(data), 1))
    length = len(data[start : start + 4096])
    _changed(path, data[:start] + bytes(length) + data[start + length :])


def _delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def _swap(path: Path, rng: random.Random) -> None:
    """Exchanges two files of the checkpoint, or of the two checkpoints."""
    own, tree = path.read_bytes(), path.parents[len(path.parts) - 1 - path.parts.index("trial")]
    others = [each for each in tree.rglob("*") if each.is_file() and each.read_bytes() != own]
    others = [each for each in others if "checkpoint-2" in each.parts]
    other = rng.choice(sorted(others))
    data = other.read_bytes()
    other.write_bytes(own)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip a bit": _flip,
    "cut": _cut,
    "zero 4 KB": _zero,
    "delete": _delete,
    "swap two files": _swap,
}
