"""Full disks, used folders and folders in use."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from forked import Aim, Windows, fork
from outcome import Outcome, Progress
from subject import Subject, watch

from jaxlora.checkpoints import run_folder
from jaxlora.checkpoints.manifest import leaf_paths
from jaxlora.checkpoints.space import checkpoint_bytes
from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.core.errors import UserError

_DISK = 16 << 20
_LEAVES = 1 << 18  # 1 MiB


def fill_disk(subject: Subject, trials: int, say: Progress) -> list[Outcome]:
    """Saves to a small disk that is full after so many bytes of the save."""
    say(f"full disk: {trials} offsets")
    report = subject.root / "disk.txt"
    with _small_disk(subject.root / "disk") as folder:
        if folder is None:
            return [Outcome("full disk", 0, 0, "this machine lets nobody mount a tmpfs")]
        offsets = [subject.rng.random() * 1.1 for _ in range(trials)]

        def work() -> int:
            report.write_text("\n".join(_fill(folder, offsets)))
            return 0

        ended = fork(work, Windows())
        failures = report.read_text().splitlines() if ended.status == 0 else [ended.output[-500:]]
        law = "disk full in a save: error at once, the good step restorable, the space given back"
        first = Outcome(law, trials - len(failures), trials, "tmpfs of 16 MiB", tuple(failures))
        return [first, _fill_run(subject, folder, say)]


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _state(step: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(step).standard_normal(_LEAVES).astype("f4")}


def _fill(disk: Path, offsets: list[float]) -> list[str]:
    failures, size = [], checkpoint_bytes(leaf_paths(_state(0)))
    for number, offset in enumerate(offsets):
        folder, filler = disk / f"run-{number}", disk / "filler"
        with CheckpointStore(folder, keep=2) as store:
            store.save(1, _state(1), {})
            store.wait()
            before = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(max(before - int(offset * size), 0)))
            free, wrong = shutil.disk_usage(disk).free, None
            try:
                store.save(2, _state(2), {})
                store.wait()
            except UserError as error:
                wrong = None if "free space" in str(error) else str(error)
                after = shutil.disk_usage(disk).free
                if after < free - (1 << 16):
                    wrong = f"{free - after} bytes of the failed save are still there"
                if store.steps() != [1]:
                    wrong = f"lists {store.steps()}"
            else:
                wrong = None if store.steps() == [1, 2] else "no error and no step 2"
            state, _ = store.restore(1, _state(0))
            if np.asarray(state["w"]).tobytes() != _state(1)["w"].tobytes():
                wrong = "step 1 is damaged"
            if wrong is not None:
                failures.append(f"{offset:.2f} of a save: {wrong}")
        filler.unlink()
        shutil.rmtree(folder)
    return failures


def _fill_run(subject: Subject, disk: Path, say: Progress) -> Outcome:
    """A run whose disk is full from its third save on; there is room again, and it continues."""
    folder, filler = disk / "run", disk / "filler"

    def fill_at_third(windows: Windows) -> None:
        write, saves = CheckpointStore._write, []

        def filled(self: CheckpointStore, *arguments: object) -> None:
            saves.append(1)
            if len(saves) == 3:
                filler.write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
            write(self, *arguments)  # type: ignore[arg-type]

        CheckpointStore._write = filled  # type: ignore[method-assign]

    failures = []
    ended = subject.start(folder, prepare=fill_at_third)
    if ended.status != 2 or "Traceback" in ended.output or "free space" not in ended.output:
        failures.append(f"full: status {ended.status}: {ended.output[-300:]}")
    ended = subject.start(folder)
    if ended.status != 2 or "output_dir" not in ended.output:
        failures.append(f"still full: status {ended.status}: {ended.output[-300:]}")
    filler.unlink(missing_ok=True)
    ended = subject.start(folder)
    found = subject.check(folder, finished=True) if ended.status == 0 else [ended.output[-300:]]
    say(f"full disk: a run, {len(failures + found)} failures")
    law = "disk full in a run: status 2 in one line, refused while full, then continued the same"
    return Outcome(law, 0 if failures + found else 1, 1, "", (*failures, *found))


def use_folders(subject: Subject, trials: int, say: Progress) -> Outcome:
    """A second run in the folder of a live one is refused; after kill -9 the folder is free."""
    say(f"folders in use: {trials} trials")
    failures, slowest = [], 0.0
    for number in range(trials):
        folder, windows = subject.root / f"used-{number}", Windows()

        def hold(folder: Path = folder, windows: Windows = windows) -> int:
            watch(windows)
            run_folder.claim(folder, config_text="a: 1", resume=False)
            windows.open("restore")
            started = time.monotonic()
            second = os.fork()
            if second == 0:
                try:
                    run_folder.claim(folder, config_text="a: 1", resume=True)
                except UserError as error:
                    os._exit(0 if f"process {os.getppid()} on" in str(error) else 2)
                os._exit(1)
            status = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
            print(f"{status} {time.monotonic() - started}", flush=True)
            windows.open("save")
            time.sleep(60)
            return 0

        ended = fork(hold, windows, Aim("save", 1, random.random() * 0.1, 1.0, signal.SIGKILL))
        status, seconds = ended.output.split()
        slowest = max(slowest, float(seconds))
        try:
            run_folder.claim(folder, config_text="a: 1", resume=True).release()
        except UserError as error:
            failures.append(f"trial {number}: {error}")
        if status != "0" or ended.status != -signal.SIGKILL:
            failures.append(f"trial {number}: {ended.output}")
    law = "a second run in a folder is refused naming the first; after kill -9 it is free"
    detail = f"refused within {slowest:.2f} s"
    return Outcome(law, trials - len(failures), trials, detail, tuple(failures))


def estimate_sizes(subject: Subject, say: Progress) -> Outcome:
    """What a checkpoint was thought to take before the first step, and what it takes."""
    say("sizes of checkpoints")
    shapes = [
        (10, 1 << 10),
        (10, 1 << 14),
        (40, 1 << 13),
        (4, 1 << 18),
        (100, 1 << 14),
        (400, 1 << 12),
    ]
    report = subject.root / "sizes.txt"

    def work() -> int:
        ratios = []
        for number, (leaves, size) in enumerate(shapes):
            draw = np.random.default_rng(0).standard_normal  # zeros and ones would be compressed
            state = {
                part: {
                    f"layers/attention/q_proj/{i}": draw(size).astype("f4") for i in range(leaves)
                }
                for part in ("trainable", "mu", "nu")
            }
            folder = subject.root / f"size-{number}"
            with CheckpointStore(folder) as store:
                store.save(1, state, {"identity": "x" * 1500})
            taken = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            ratios.append(checkpoint_bytes(leaf_paths(state)) / taken)
        report.write_text(" ".join(f"{ratio:.3f}" for ratio in ratios))
        return 0

    ended = fork(work, Windows())
    if ended.status:
        return Outcome("sizes of checkpoints", 0, 1, "", (ended.output[-500:],))
    ratios = [float(ratio) for ratio in report.read_text().split()]
    good = sum(0.9 <= ratio <= 1.1 for ratio in ratios)
    detail = f"estimated / real: {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    law = "the size of a checkpoint, known before step 1, is right within 10 %"
    return Outcome(law, good, len(ratios), detail, () if good == len(ratios) else (detail,))
