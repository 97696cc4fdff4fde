"""Checkpoints of a run of several processes: process 0 writes and reads them for all.

The state passes through the host of process 0, so that neither a shared file system nor equal
numbers of processes are needed to continue; adapters are small.
"""

import os
from typing import Any

import jax
import numpy as np

from jaxlora.checkpoints.remote import Mirror
from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.parallel import processes
from jaxlora.parallel.arrays import fetch, spread


def open_store(
    folder: str | os.PathLike[str], *, keep: int | None = None, mirror: Mirror | None = None
) -> CheckpointStore:
    """Returns the checkpoints of a run, shared by its processes.

    Args:
      folder, keep: as of `CheckpointStore`.
      mirror: brings up what has been committed.
    """
    several = processes.count() > 1
    store = SharedStore(folder, keep=keep) if several else CheckpointStore(folder, keep=keep)
    if mirror is not None:
        own = store.own if isinstance(store, SharedStore) else store
        assert own is not None, "process 0 has the mirror and the store"
        own.committed = mirror.push
    return store


class SharedStore(CheckpointStore):
    """As `CheckpointStore`; every process makes the same calls."""

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None = 4) -> None:
        super().__init__(folder, keep=keep)
        self.own = CheckpointStore(folder, keep=keep) if processes.is_first() else None

    def save(self, step: int, state: Any, meta: dict[str, Any], *, owned: bool = False) -> None:
        host = fetch(state)
        with processes.together("save"):
            if self.own is not None:
                self.own.save(step, host, meta, owned=True)

    def wait(self) -> None:
        with processes.together("wait"):
            if self.own is not None:
                self.own.wait()

    def check(self) -> None:
        """Does nothing: a failed save is told at the next one, on all processes at once."""

    def settle(self, seconds: float) -> None:
        if self.own is not None:
            self.own.settle(seconds)

    def close(self) -> None:
        """Waits on process 0 alone: an error may have brought only this one here."""
        if self.own is not None:
            self.own.close()

    def restore(self, step: int | None, target: Any) -> tuple[Any, dict[str, Any]]:
        read: list[Any] = []

        def on_host() -> dict[str, Any]:
            assert self.own is not None, "process 0 has the store"
            state, meta = self.own.restore(step, jax.tree.map(_on_host, target))
            read.append(state)
            return meta

        meta = processes.on_first("restore", on_host)
        return spread(read[0] if read else None, target), meta


def _on_host(leaf: jax.Array) -> np.ndarray:
    """Tells the store "numpy", and takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
