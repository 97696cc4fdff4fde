"""The run that is tried: the embedded tiny Llama, a few rows, 12 steps; and what it must end in."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from forked import Ended, Windows, fork

import jaxlora
from jaxlora import cli
from jaxlora.checkpoints import manifest
from jaxlora.checkpoints.orbax_arrays import load_arrays
from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.data.batches import Batches
from jaxlora.training import plot, resume
from jaxlora.training.phases import Phases

STEPS = 12
_PAUSE_S = 0.1
BASE = Path(jaxlora.__file__).parent / "assets" / "tiny-llama"
PROMPT = {"field_instruction": "question", "field_output": "answer", "format": "{instruction}\n"}


class Subject:
    """A run's configuration and its outcome when nothing disturbs it.

    Args:
      root: folder for everything.
      seed: of the trials.
    """

    def __init__(self, root: Path, seed: int):
        self.root, self.rng, self.starts = root, random.Random(seed), 0
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        _import_what_runs_import(root)
        self._rows = _write_rows(root / "rows.jsonl", 40)
        self.usual = self._reference()

    def keys(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """The keys of the run in a folder."""
        return {
            "base_model": str(BASE),
            "datasets": [{"path": str(self._rows), "type": PROMPT}],
            "dataset_prepared_path": str(self.root / "prepared"),
            "output_dir": str(folder),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.2,
            "lora_target_linear": True,
            "sequence_len": 64,
            "sample_packing": True,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 2,
            "eval_steps": 3,
            "val_set_size": 4,
            "seed": 7,
            "auto_resume_from_checkpoints": True,
            **changes,
        }

    def start(
        self,
        folder: Path,
        aim: Any = None,
        prepare: Callable[[Windows], None] = lambda windows: None,
        **changes: Any,
    ) -> Ended:
        """Starts (or continues) the run in a fork: exactly what the command does."""
        config = folder.with_suffix(".yml")
        config.write_text(yaml.safe_dump(self.keys(folder, **changes)))
        windows = Windows()

        def work() -> int:
            watch(windows)
            _slow_down()
            prepare(windows)
            return cli.main(["train", str(config)])

        self.starts += 1
        return fork(work, windows, aim)

    def _reference(self) -> dict[str, float]:
        """Runs it undisturbed, every state saved; keeps digests and usual lengths of windows."""
        folder, windows = self.root / "whole", Windows()

        def work() -> int:
            watch(windows)
            keys = self.keys(folder, save_steps=1, save_total_limit=100)
            config = folder.with_suffix(".yml")
            config.write_text(yaml.safe_dump(keys))
            status = cli.main(["train", str(config)])
            digests = {step: digest(folder, step) for step in steps(folder)}
            (self.root / "digests.json").write_text(json.dumps(digests))
            return status

        ended = fork(work, windows)
        assert ended.status == 0, ended.output
        digests = json.loads((self.root / "digests.json").read_text())
        self.digests = {int(step): value for step, value in digests.items()}
        self.adapter = (folder / "adapter_model.safetensors").read_bytes()
        self.metrics = metrics(folder)
        usual = {name: windows.mean_s(name) for name in ("write", "export", "save", "eval")}
        usual |= {name: windows.mean_s(name) for name in ("step", "compile")}
        return usual | {"data": _PAUSE_S}

    def differences(self, folder: Path) -> list[str]:
        """What a finished run has otherwise than the undisturbed one; call it in a fork."""
        found = []
        if (folder / "adapter_model.safetensors").read_bytes() != self.adapter:
            found.append("adapter")
        if metrics(folder) != self.metrics:
            found.append("metrics")
        return found + self.bad_steps(folder)

    def bad_steps(self, folder: Path) -> list[str]:
        """Listed checkpoints that are not, bit for bit, the state of that step; in a fork."""
        return [
            f"checkpoint of step {step}"
            for step in steps(folder)
            if digest(folder, step) != self.digests[step]
        ]

    def check(self, folder: Path, finished: bool) -> list[str]:
        """`differences` or `bad_steps` in a fork of their own."""

        def work() -> int:
            found = self.differences(folder) if finished else self.bad_steps(folder)
            print("\n".join(found))
            return 0

        ended = fork(work, Windows())
        if ended.status:
            return [ended.output.strip().splitlines()[-1]]
        return [line for line in ended.output.splitlines() if line]


def _slow_down() -> None:
    """Steps of this size take milliseconds; slowed down, signals fall into all of them."""
    make = Batches.batch

    def batch(self: Batches, *arguments: Any) -> Any:
        time.sleep(_PAUSE_S)
        return make(self, *arguments)

    Batches.batch = batch  # type: ignore[method-assign]


def steps(folder: Path) -> list[int]:
    """Listed checkpoints of a run."""
    return CheckpointStore(folder / resume.CHECKPOINTS).steps()


def digest(folder: Path, step: int) -> str:
    """A digest of adapter and optimizer of one checkpoint, its files verified."""
    path = CheckpointStore(folder / resume.CHECKPOINTS).path(step)
    described = manifest.read(path)
    manifest.verify(path, described)
    target = {name: np.zeros(shape, dtype) for name, (shape, dtype) in described.leaves.items()}
    total = hashlib.sha256()
    for name, array in sorted(load_arrays(path / "state", target).items()):
        total.update(name.encode() + np.asarray(array).tobytes())
    return total.hexdigest()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, less what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_s"} for x in lines]


def steps_done(folder: Path) -> int:
    """The last step of which there is a loss; a line cut off by a kill is none."""
    path, done = folder / "metrics.jsonl", 0
    for line in path.read_text().splitlines() if path.is_file() else []:
        if line.endswith("}") and "loss" in (record := json.loads(line)):
            done = record["step"] if record["step"] > done else done
    return done


def watch(windows: Windows) -> None:
    """Makes everything of a run in this process open its window."""
    entering = Phases.__call__

    @contextmanager
    def phase(self: Phases, name: str) -> Iterator[None]:
        before = windows.open(name)
        try:
            with entering(self, name):
                yield
        finally:
            windows.close(name, before)

    Phases.__call__ = phase  # type: ignore[method-assign]
    for owner, name, window in (
        (CheckpointStore, "_write", "write"),
        (CheckpointStore, "_discard", "delete"),
        (CheckpointStore, "_empty_trash", "delete"),
        (resume, "restore", "restore"),
    ):
        _wrap(owner, name, window, windows)
    windows.open("setup")


def _wrap(owner: Any, name: str, window: str, windows: Windows) -> None:
    function = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        before = windows.open(window)
        try:
            return function(*arguments)
        finally:
            windows.close(window, before)

    setattr(owner, name, call)


def kill_at_event(windows: Windows, window: str, event: int) -> None:
    """kill -9 just before the nth call to the file system inside a window of this process."""
    seen = 0

    def audit(name: str, _: Any) -> None:
        nonlocal seen
        if windows.now == window and name.startswith(("os.", "shutil.", "open")):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def _import_what_runs_import(root: Path) -> None:
    """Imports that runs do late, so that forks have them."""
    from orbax.checkpoint import v1  # noqa: F401

    from jaxlora.data.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    load_tokenizer(BASE)
    plot.plot_losses([{"step": 1, "loss": 1.0}], root / "plot.png", "")


def _write_rows(path: Path, count: int) -> Path:
    rng, words = random.Random(0), "red green blue cat dog house river stone seven".split()
    with path.open("w") as file:
        for _ in range(count):
            chosen = rng.choices(words, k=rng.randint(1, 6))
            row = {"question": "Turn: " + " ".join(chosen), "answer": " ".join(chosen[::-1])}
            file.write(json.dumps(row) + "\n")
    return path
