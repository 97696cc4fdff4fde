"""Training states on disk: orbax arrays under our own commit record, retention and exit guard.

`save` copies the arrays to the host, then a thread of ours runs orbax's synchronous save into a
temporary folder, seals it with a manifest and renames it. Orbax's own asynchronous save is not used
because one that is in flight when the interpreter exits is lost and often hangs the exit; a thread
we own can be waited for (`jaxlora.checkpoints.background` has the figures).
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jaxlora.checkpoints import manifest as manifests
from jaxlora.checkpoints.background import Background
from jaxlora.checkpoints.manifest import DamagedCheckpoint, Manifest
from jaxlora.checkpoints.orbax_arrays import load_arrays, save_arrays
from jaxlora.core.errors import UserError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_TEMPORARY = ".temporary-"
_TRASH = ".trash"


def locate(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Splits a checkpoint path into store folder and step; step is None for a store folder.

    >>> locate("/runs/a/checkpoint-40")
    (PosixPath('/runs/a'), 40)
    """
    absolute = Path(path).expanduser().absolute()
    match = _NAME.fullmatch(absolute.name)
    return (absolute.parent, int(match[1])) if match else (absolute, None)


class CheckpointStore:
    """Checkpoints of one run, ``folder/checkpoint-<step>``; nothing is written before `save`.

    Args:
      folder: where the checkpoints lie; made by the first `save`.
      keep: how many of the newest to keep, at least 1; None keeps all.

    One process at a time may save (see `jaxlora.checkpoints.run_folder`); any number may read.

    >>> with CheckpointStore(folder) as store:  # doctest: +SKIP
    ...     store.save(10, {"w": jnp.ones(3)}, {"seed": 0})
    >>> state, meta = store.restore(None, {"w": jnp.zeros(3)})  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None = 4) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep} must be at least 1, or None to keep all.")
        self.folder = Path(folder).expanduser().absolute()
        self._keep = keep
        self._background = Background()
        self._position: int | None = None  # the step last saved or restored here
        self._swept = False
        self.committed: Callable[[], None] = lambda: None  # called after each, by who writes it

    def save(self, step: int, state: Any, meta: dict[str, Any], *, owned: bool = False) -> None:
        """Copies `state` (a pytree of arrays) to the host and starts writing it.

        When it returns the arrays may be donated or changed. Waits for the save before. Later
        steps on disk, left by the run from before a restore, go when this one is committed.

        Args:
          step: optimizer steps done.
          state: the arrays.
          meta: a JSON object that `restore` returns.
          owned: `state` is numpy arrays that nobody will change: they are not copied.

        Raises:
          UserError: the save before failed for want of space or access, or the folder holds
            checkpoints and none was restored.
          RuntimeError: the save before failed otherwise.
          TypeError: a leaf is no array, or meta is not JSON.
          ValueError: step is not beyond the last saved or restored one.
        """
        from orbax.checkpoint import v1  # noqa: F401  here: an import is slow beside a save

        self.wait()
        if self._position is not None and step <= self._position:
            raise ValueError(f"step {step} is not beyond {self._position}, saved or restored here.")
        if self._position is None and self.on_disk():
            raise UserError(
                f"{self.folder}: already holds checkpoints up to step {max(self.on_disk())}; "
                "set resume_from_checkpoint: true or another output_dir."
            )
        frozen_meta = json.loads(json.dumps({**meta, "step": step}))
        leaves = manifests.leaf_paths(state)
        arrays = leaves if owned else _to_host(leaves)
        self._background.start(lambda: self._write(step, arrays, frozen_meta), f"save-{step}")
        self._position = step

    def wait(self) -> None:
        """Waits until the save under way is committed; raises as `save` does if it failed."""
        self._background.wait()

    def check(self) -> None:
        """Raises if a finished save failed; never waits. Meant to be called every step."""
        self._background.check()

    def settle(self, seconds: float) -> None:
        """Gives the save under way so long to be committed; raises nothing."""
        self._background.join(seconds)

    def close(self) -> None:
        """The same as `wait`: call it in ``finally``, or use the store as a context manager."""
        self.wait()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            _log.error("%s", failure)  # the error that ended the run must not be hidden by ours

    def steps(self) -> list[int]:
        """Committed steps, oldest first; a save under way is not among them."""
        return [step for step in self.on_disk() if (self.path(step) / manifests.MANIFEST).exists()]

    def latest(self) -> int | None:
        """The newest committed step, None when there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies, or would."""
        return self.folder / f"checkpoint-{step}"

    def describe(self, step: int) -> Manifest:
        """Meta, leaf shapes and file sizes of one checkpoint, without reading its arrays.

        Raises:
          UserError: there is no such checkpoint, or its manifest is damaged.
        """
        if step not in self.on_disk():
            raise UserError(f"{self.folder}: no checkpoint of step {step}; it has {self.steps()}.")
        return manifests.read(self.path(step))

    def restore(self, step: int | None, target: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the state of `step` and its meta, which always has ``"step"``.

        Args:
          step: None takes the newest good one, with a logged warning for each damaged one passed.
          target: a pytree of arrays or `jax.ShapeDtypeStruct`: structure, shapes, dtypes and
            shardings to restore. A numpy leaf gives a numpy array, a leaf without a sharding (or
            an uncommitted array) an uncommitted array on the default device.

        Raises:
          UserError: no checkpoint, a damaged one, or one whose leaves are not those of `target`.
        """
        self.wait()
        for candidate in [step] if step is not None else reversed(self.on_disk()):
            try:
                restored = self._restore(candidate, target)
            except DamagedCheckpoint as damage:
                if step is not None:
                    raise
                _log.warning("%s Trying the checkpoint before it.", damage)
                continue
            self._position = candidate
            return restored
        raise UserError(
            f"{self.folder}: no {'good ' if self.on_disk() else ''}checkpoint to resume from; "
            "start anew in another output_dir."
        )

    def _restore(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        manifest, path, leaves = self.describe(step), self.path(step), manifests.leaf_paths(target)
        manifests.check_target(path, manifest, leaves)
        manifests.verify(path, manifest)
        restored = load_arrays(path / "state", leaves)
        # Orbax casts and reshapes without a word; our manifest has ruled it out, this proves it.
        if manifests.describe(restored) != manifest.leaves:
            raise RuntimeError(f"{path}: orbax restored other shapes or dtypes than were saved.")
        structure = jax.tree_util.tree_structure(target)
        return jax.tree_util.tree_unflatten(structure, restored.values()), manifest.meta

    def _write(self, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        temporary = self.folder / f"{_TEMPORARY}{step}"
        try:
            self._sweep()
            temporary.mkdir()
            save_arrays(temporary / "state", arrays)
            manifests.seal(temporary, step, meta, manifests.describe(arrays))
            self._commit(temporary, step)
            self.committed()
        except UserError:
            raise
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)  # gives a full disk its space back
            text = " ".join(str(error).split())
            theirs = _OS_ERROR.search(text)  # tensorstore says it in a page of its own
            text = os.strerror(int(theirs[1])) if theirs else text
            message = f"{self.folder}: saving step {step} failed: {text}"
            if isinstance(error, OSError) or theirs:
                raise UserError(f"{message}; free space or fix access, then resume.") from error
            raise RuntimeError(message) from error

    def _commit(self, temporary: Path, step: int) -> None:
        # Before the rename: were later steps still there after a kill, they would be "the newest".
        for stale in self.on_disk():
            if stale >= step:
                self._discard(stale)
        os.rename(temporary, self.path(step))
        manifests.fsync_folder(self.folder)
        if self._keep is not None:
            for old in self.on_disk()[: -self._keep]:
                self._discard(old)
        self._empty_trash()

    def _discard(self, step: int) -> None:
        # A rename first, so that a kill never leaves a half-deleted checkpoint among the listed.
        trash = self.folder / _TRASH
        trash.mkdir(exist_ok=True)
        os.rename(self.path(step), trash / f"{step}-{time.time_ns()}")

    def _empty_trash(self) -> None:
        shutil.rmtree(self.folder / _TRASH, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what killed processes left; once, because only then can it be no one's work."""
        if not self._swept:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifests.fsync_folder(self.folder.parent)
            self._empty_trash()
            for leftover in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._swept = True

    def on_disk(self) -> list[int]:
        """Steps that have a folder, good or damaged, oldest first."""
        if not self.folder.is_dir():
            return []
        entries = ((entry, _NAME.fullmatch(entry.name)) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for entry, match in entries if match and entry.is_dir())


def _to_host(leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """Copies every leaf; a view of a CPU buffer would change when the buffer is donated."""
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array):
            if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
                raise UserError(
                    "Saving a state sharded over several hosts is not supported; "
                    "keep the trainable parameters replicated across hosts."
                )
            leaf.copy_to_host_async()
    return {name: np.array(leaf) for name, leaf in leaves.items()}
