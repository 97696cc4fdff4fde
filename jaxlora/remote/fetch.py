"""Copies of files and folders on object storage, made once and kept while the original is equal."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.remote.location import local_copy, open_storage, reason

# What tells one version of an object from the next, by library.
_VERSIONS = ("etag", "ETag", "md5Hash", "content_md5", "generation", "updated", "mtime", "created")


def fetch(address: str, key: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Returns the local copy of a file or a folder, after copying what is new or has changed.

    Of several processes on a machine one copies, and the others wait for it.

    Args:
      address: of object storage.
      key: of the configuration, for errors.
      wanted: which files of a folder, by their paths in it.

    Raises:
      UserError: nothing is there, it cannot be read, or the package for it is missing.
    """
    target = local_copy(address)
    record = local_copy(address, "versions") / "versions.json"
    storage, root = open_storage(address)
    try:
        files = list_files(storage, root)
        if not files:
            raise UserError(f"{key}: {address} does not exist, or holds no file.")
        with _alone(record.parent):
            if set(files) == {""}:
                _copy(storage, root, files[""], target, record)
                return target
            for name, info in files.items():
                if wanted(name):
                    _copy(storage, f"{root}/{name}", info, target / name, record)
            _remove_others(target, files)
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own
        raise UserError(f"{key}: {address} cannot be read: {reason(error)}") from error
    return target


def list_files(storage: Any, root: str) -> dict[str, dict[str, Any]]:
    """Returns what a storage says of each file below a path, by its path in it ("": the path).

    Raises:
      UserError: a name that would lead out of the folder.
    """
    storage.invalidate_cache()
    found: dict[str, dict[str, Any]] = {}
    for path, info in storage.find(root, detail=True).items():
        name = path.removeprefix(root).strip("/")
        if any(part in ("", ".", "..") for part in name.split("/")) and name:
            raise UserError(f"{path}: has a name that cannot be a file here.")
        found[name] = info
    return found


def download(storage: Any, path: str, target: Path) -> None:
    """Copies one file; the target is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".fetching-")
    os.close(handle)
    try:
        storage.get_file(path, temporary)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for the other processes of this machine; the kernel forgets one that has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(storage: Any, path: str, info: dict[str, Any], target: Path, record: Path) -> None:
    version = [info.get("size"), *(str(info[name]) for name in _VERSIONS if name in info)]
    if target.is_file() and _read(record).get(path) == version:
        return
    download(storage, path, target)
    _write(record, {**_read(record), path: version})


def _remove_others(folder: Path, files: Collection[str]) -> None:
    """What is gone from the storage must not be read here."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()


def _read(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}


def _write(record: Path, content: dict[str, Any]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=record.parent, prefix=".fetching-")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file)
    os.replace(temporary, record)
