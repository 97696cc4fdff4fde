"""A run's folder on object storage, and the folder here that stands for it while it runs.

Object storage has no rename: a checkpoint counts once its manifest is there, which goes up last and
goes away first. Its digests are those of all other files, so that a half is never taken for whole.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxlora.checkpoints import manifest as manifests
from jaxlora.checkpoints import run_folder
from jaxlora.checkpoints.manifest import MANIFEST
from jaxlora.checkpoints.run_folder import MARKER
from jaxlora.core.errors import UserError
from jaxlora.remote.fetch import download, list_files
from jaxlora.remote.location import local_copy, open_storage, reason

_log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
_LAST = ("config.json", "adapter_config.json")
_ATTEMPTS = 4


class Mirror:
    """Keeps a run's folder on object storage equal to the one here, one way: upwards.

    Args:
      address: of the run's folder.
      keep: how many checkpoints to keep there; None keeps all.
    """

    def __init__(self, address: str, *, keep: int | None = None) -> None:
        self.address, self._keep = address.rstrip("/"), keep
        self.folder = local_copy(address, "runs")
        self._storage, self._root = open_storage(self.address)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change when it went up
        self._damaged: set[int] = set()  # there, and not what was saved
        self._pushing = threading.Lock()

    def pull(self, step: int | None = None) -> None:
        """Makes the folder here what the storage holds: its files, and one checkpoint.

        Args:
          step: of that checkpoint; None: the newest.

        Raises:
          UserError: the address holds something else than a run, or cannot be read; another
            process of this machine is at work in the folder.
        """
        run_folder.refuse_if_locked(self.folder)
        there = self._list()
        if there and MARKER not in there:
            raise UserError(
                f"output_dir {self.address} has files that are not a jaxlora run's (e.g. "
                f"{min(there)}); choose another output_dir or an empty one."
            )
        self._clear()
        for name in sorted(there, key=lambda name: name != MARKER):  # tells whose the rest is
            if not name.startswith(f"{CHECKPOINTS}/"):
                self._get(name)
        for candidate in [step] if step is not None else reversed(_steps(there)):
            for name in _of_step(candidate, there):
                self._get(name)
            if self._is_whole(candidate):
                return

    def push(self) -> None:
        """Brings up what has changed here since the last time; safe to repeat after a failure.

        Raises:
          UserError: the storage cannot be written, after some attempts.
        """
        with self._pushing:
            here, there = self._files(), self._list()
            own, stored = _steps(here), {*_steps(there)} - self._damaged
            # Halves, and what was left behind when the run went back: gone before a new one counts.
            stale = {step for step in stored if own and step > own[-1]}
            for step in {*_steps(there, committed=False)} - (stored - stale):
                self._remove(step, there)
            # A configuration makes a folder of weights a model or an adapter.
            for name in sorted(here, key=lambda name: name.rpartition("/")[2] in _LAST):
                if not name.startswith(f"{CHECKPOINTS}/"):
                    self._put(name)
            for step in (step for step in own if step not in stored):
                for name in _of_step(step, here):
                    self._put(name)
            kept = sorted({*own, *stored} - stale)
            for step in kept[: -self._keep] if self._keep is not None else []:
                self._remove(step, there)

    def _clear(self) -> None:
        """Empties the folder here, unless it holds folders of runs at addresses below this one."""
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if MARKER in names or all(name.startswith(".") for name in names):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _is_whole(self, step: int) -> bool:
        """Whether a checkpoint arrived as it was saved; what is damaged is put away."""
        path = self.folder / _path(step)
        try:
            manifests.verify(path, manifests.read(path))
        except manifests.DamagedCheckpoint as damage:
            _log.warning("%s Trying the checkpoint before it.", damage)
            shutil.rmtree(path, ignore_errors=True)
            self._damaged.add(step)
            return False
        return True

    def _files(self) -> dict[str, Path]:
        """Files of the run here by their paths in its folder; nothing temporary, no lock."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            hidden = any(part.startswith(".") for part in name.split("/"))
            if path.is_file() and not hidden and not name.endswith(".temporary"):
                found[name] = path
        return found

    def _list(self) -> dict[str, Any]:
        try:
            return list_files(self._storage, self._root)
        except FileNotFoundError:
            return {}
        except UserError:
            raise
        except Exception as error:  # each library has errors of its own
            raise UserError(f"{self.address}: cannot be read: {reason(error)}") from error

    def _get(self, name: str) -> None:
        target = self.folder / name
        self._retry(lambda: download(self._storage, f"{self._root}/{name}", target))
        self._sent[name] = _state(target)

    def _put(self, name: str) -> None:
        path = self.folder / name
        try:
            if self._sent.get(name) == (state := _state(path)):
                return
            self._retry(lambda: self._storage.put_file(str(path), f"{self._root}/{name}"))
            self._sent[name] = state
        except FileNotFoundError as error:
            if path.exists():  # so storage libraries say that there is no such bucket
                raise UserError(f"{self.address}: cannot be written: {reason(error)}") from error
            # Replaced while others went up: next time.

    def _remove(self, step: int, there: dict[str, Any]) -> None:
        for name in reversed(_of_step(step, there)):
            self._retry(lambda name=name: self._storage.rm_file(f"{self._root}/{name}"))
            self._sent.pop(name, None)

    def _retry(self, work: Callable[[], object]) -> None:
        """Tries again after 1, 2 and 4 s: storage far away fails now and then."""
        for attempt in range(_ATTEMPTS):
            try:
                work()
                return
            except FileNotFoundError:
                raise
            except Exception as error:  # each library has errors of its own
                if attempt == _ATTEMPTS - 1:
                    raise UserError(
                        f"{self.address}: {reason(error)}; the run's files are in {self.folder}."
                    ) from error
                time.sleep(2**attempt)


def _path(step: int) -> str:
    return f"{CHECKPOINTS}/checkpoint-{step}"


def _of_step(step: int, names: Iterable[str]) -> list[str]:
    """Files of one checkpoint, the manifest last."""
    manifest = f"{_path(step)}/{MANIFEST}"
    own = [name for name in names if name.startswith(f"{_path(step)}/")]
    return sorted(own, key=lambda name: (name == manifest, name))


def _steps(names: Iterable[str], *, committed: bool = True) -> list[int]:
    """Checkpoints among the names of files, oldest first; with a manifest, or any."""
    parts = [name.split("/") for name in names if name.startswith(f"{CHECKPOINTS}/checkpoint-")]
    parts = [part for part in parts if part[2:] == [MANIFEST] or not committed]
    found = {part[1].removeprefix("checkpoint-") for part in parts}
    return sorted(int(text) for text in found if text.isdecimal())


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
