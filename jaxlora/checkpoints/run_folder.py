"""Who owns an output folder: one run by its marker file, one live process by its lock.

`check` writes nothing and is for the early refusals; `claim` comes after every other check passed.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType

from jaxlora.checkpoints.manifest import fsync_folder, write_durably
from jaxlora.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no lock, the marker still guards against a second run
    fcntl = None

MARKER = "jaxlora_run.json"
LOCK = ".jaxlora.lock"
_OURS = {MARKER, f"{MARKER}.temporary", LOCK}
_PROBE_S = 0.3  # how long to try for the lock: `check` in another process holds it for an instant


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """An output folder this process owns until `release` or its end, however that comes.

    Attributes:
      path: absolute.
      run_id: made when the folder was first claimed; a resumed run keeps it.
      resumed: the folder held this run already.
      config_changed: the config text differs from the one the run was started with.
    """

    path: Path
    run_id: str
    resumed: bool
    config_changed: bool
    _lock: int | None = dataclasses.field(repr=False)

    def release(self) -> None:
        """Lets another process have the folder; safe to call twice."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)
            object.__setattr__(self, "_lock", None)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def holds_run(output_dir: str | os.PathLike[str]) -> bool:
    """Whether a jaxlora run has claimed `output_dir`."""
    return (_absolute(output_dir) / MARKER).is_file()


def check(output_dir: str | os.PathLike[str], *, resume: bool) -> Path:
    """Returns the absolute folder if `claim` would accept it. Writes nothing.

    Raises:
      UserError: it is a file, cannot be written, holds another run or foreign files, is in use by
        a live process, or there is nothing to resume.
    """
    folder = _absolute(output_dir)
    _refuse_unusable(folder)
    _refuse_contents(folder, resume)
    refuse_if_locked(folder)
    return folder


def refuse_if_locked(folder: Path) -> None:
    """Makes no file.

    Raises:
      UserError: a live process has locked the folder.
    """
    if fcntl is not None and (folder / LOCK).is_file():
        handle = os.open(folder / LOCK, os.O_RDONLY)
        try:
            _flock(handle, folder, fcntl.LOCK_SH)
        finally:
            os.close(handle)


def claim(output_dir: str | os.PathLike[str], *, config_text: str, resume: bool) -> RunFolder:
    """Makes the folder if need be, locks it and marks it as this run's.

    Raises:
      UserError: as `check`.
    """
    folder = check(output_dir, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {folder}: cannot be made: {error.strerror}.") from error
    lock = _lock(folder)
    digest = hashlib.sha256(config_text.encode()).hexdigest()
    try:
        _refuse_contents(folder, resume)  # again: another process may have come first
        marker = _read_marker(folder) if resume else _mark(folder, digest)
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    return RunFolder(folder, marker["run_id"], resume, marker["config_sha256"] != digest, lock)


def _absolute(output_dir: str | os.PathLike[str]) -> Path:
    text = os.fspath(output_dir)
    if not text or "\0" in text:
        raise UserError(f"output_dir {text!r} is not a path; give a folder, e.g. ./outputs/run.")
    return Path(text).expanduser().absolute()


def _refuse_unusable(folder: Path) -> None:
    """Refuses files, dangling links and folders that cannot be written or made."""
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"output_dir {folder}: {existing} is not a folder; choose another one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: no permission to write to {existing}.")


def _refuse_contents(folder: Path, resume: bool) -> None:
    marked = (folder / MARKER).is_file()
    if marked and not resume:
        raise UserError(
            f"output_dir {folder} already holds a run; "
            "set resume_from_checkpoint: true or another output_dir."
        )
    foreign = sorted(set(os.listdir(folder)) - _OURS) if folder.is_dir() and not marked else []
    if foreign:
        raise UserError(
            f"output_dir {folder} has files that are not a jaxlora run's (e.g. {foreign[0]}); "
            "choose another output_dir or an empty one."
        )
    if resume and not marked:
        raise UserError(
            f"output_dir {folder} holds no run to resume; "
            "correct output_dir or remove resume_from_checkpoint."
        )
    if marked:
        _read_marker(folder)


def _read_marker(folder: Path) -> dict[str, str]:
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        return {key: str(marker[key]) for key in ("run_id", "config_sha256")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / MARKER} is damaged; choose another output_dir, or delete the file to give "
            "the run up."
        ) from error


def _mark(folder: Path, config_sha256: str) -> dict[str, str]:
    marker = {"run_id": uuid.uuid4().hex, "config_sha256": config_sha256, "created": _now()}
    temporary = folder / f"{MARKER}.temporary"
    write_durably(temporary, json.dumps(marker, indent=1) + "\n")
    os.rename(temporary, folder / MARKER)
    fsync_folder(folder)
    return marker


def _lock(folder: Path) -> int | None:
    """Locks the folder until the returned file handle is closed or this process ends.

    The kernel drops an flock with its holder, so a lock left by kill -9 is free at once; the
    process id in the file is only there for the message.
    """
    if fcntl is None:
        return None
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _flock(handle, folder, fcntl.LOCK_EX)
    except UserError:
        os.close(handle)
        raise
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(owner).encode(), 0)
    return handle


def _flock(handle: int, folder: Path, kind: int) -> None:
    assert fcntl is not None
    deadline = time.monotonic() + _PROBE_S
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir {folder} is in use by {_owner(handle)}; "
                    "wait for it, stop it, or choose another output_dir."
                ) from error
            time.sleep(0.02)
        except OSError:  # a file system without locks: the marker still guards
            return


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
