"""Prepared data on disk, found by a key of everything that went into it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.remote.location import cache_root

_PARTS = "key.json"


def default_folder() -> Path:
    """``$JAXLORA_CACHE/datasets``, or ``~/.cache/jaxlora/datasets``."""
    return cache_root() / "datasets"


def key_of(parts: Mapping[str, Any]) -> str:
    """The cache key (hex) of JSON-like parts, independent of their order.

    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def differences(root: Path, parts: Mapping[str, Any]) -> tuple[str, ...]:
    """Which parts of a key no entry has: those that differ from the most similar entry.

    Returns:
        Lines such as ``options.sequence_len: 32, was 64``; none where there is no entry at all.
    """
    wanted = _flat(json.loads(json.dumps(parts)))
    nearest: list[tuple[str, ...]] = []
    for file in sorted(root.glob(f"*/{_PARTS}")):
        try:
            there = _flat(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
        names = sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))
        nearest.append(tuple(_change(n, wanted.get(n), there.get(n)) for n in names))
    return min(nearest, key=len, default=())


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by their path, ``train[0].path``."""
    if isinstance(value, Mapping) and value:
        dot = name and f"{name}."
        parts = ((f"{dot}{key}", each) for key, each in value.items())
    elif isinstance(value, list) and value:
        parts = ((f"{name}[{i}]", each) for i, each in enumerate(value))
    else:
        return {name: value}
    return {path: leaf for part, each in parts for path, leaf in _flat(each, part).items()}


def _change(name: str, now: Any, before: Any) -> str:
    if name.startswith("code.jaxlora"):
        return "the code of jaxlora that prepares data"
    if name.endswith(("digest", "template", "tokenizer")):
        what = "the rows of " + name.removesuffix(".digest") if "digest" in name else name
        return f"{what} (other content)"
    return f"{name}: {now}, was {before}"


def open_or_build(
    root: Path,
    key: str,
    build: Callable[[Path], Mapping[str, Any]],
    parts: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any], bool]:
    """Returns ``(folder, meta, found)`` of an entry, building it when it is not there.

    `build(folder)` writes its files and returns the meta data; `parts`, what the key was made of,
    is kept beside them for `differences`. The work is done in a folder of
    another name that is synced and renamed at the end, so a killed build leaves no usable half.

    Raises:
        UserError: the cache folder cannot be written.
    """
    final = root / key
    meta = read_meta(final)
    if meta is not None:
        return final, meta, True
    made = _make(root)
    _sweep(root, key)
    building = root / f".{key}.{os.getpid()}.tmp"
    try:
        building.mkdir()
        built = dict(build(building))
        (building / _PARTS).write_text(json.dumps(parts, indent=1), encoding="utf-8")
        built["files"] = {
            str(path.relative_to(building)): path.stat().st_size
            for path in sorted(building.rglob("*"))
            if path.is_file()
        }
        (building / "meta.json").write_text(json.dumps(built, indent=1), encoding="utf-8")
        _publish(building, final)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        for folder in made:
            # Only folders made here, and only while empty: a refused data set leaves nothing.
            _remove_empty(folder)
        if isinstance(error, OSError):
            raise UserError(f"dataset_prepared_path: {root}: {error}.") from error
        raise
    return final, built, False


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The meta data of a complete entry, else None (missing, damaged, or a file cut short)."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == n for name, n in meta["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return meta if whole else None


def _make(root: Path) -> list[Path]:
    """Creates a folder; returns those that were not there, innermost first."""
    missing = [each for each in (root, *root.parents) if not each.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"dataset_prepared_path: {root} cannot be made: {error.strerror}."
        ) from error
    return missing


def _sweep(root: Path, key: str) -> None:
    """Removes what killed builds of this key left behind; a living build is left alone."""
    for path in root.glob(f".{key}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)):
            continue
        shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(building: Path, final: Path) -> None:
    for path in building.rglob("*"):
        _sync(path)
    _sync(building)
    if final.exists():
        if read_meta(final) is not None:
            # Another process built the same entry first.
            shutil.rmtree(building, ignore_errors=True)
            return
        shutil.rmtree(final)
    os.rename(building, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
