"""Which files a data set is, and its rows: a file or folder here or far, or a hub id."""

import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.lines import Row, RowOrFault
from jaxlora.data.readers import READERS, scan_rows, suffix, without_faults
from jaxlora.data.spec import DatasetSpec
from jaxlora.remote.fetch import fetch
from jaxlora.remote.location import is_address, is_storage

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
# A file whose name says one of these belongs to that split; any other file is training data.
_SPLIT_WORDS = {
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
}


def rows(spec: DatasetSpec) -> Iterator[Row]:
    """Yields ``(origin, columns)`` for every row of a data set, in file order.

    Raises:
        UserError: nothing is found at the path, or a row cannot be read (file and line named).
    """
    yield from without_faults(scan(spec))


def scan(spec: DatasetSpec) -> Iterator[RowOrFault]:
    """As `rows`, but what is wrong with one row comes in its place (`readers.scan_rows`)."""
    yield from islice(_sliced(spec), spec.shards_idx, None, spec.shards)


def _sliced(spec: DatasetSpec) -> Iterator[RowOrFault]:
    name, start, stop = _parse_split(spec)
    if is_local(spec):
        found: Iterator[RowOrFault] = _local_rows(files(spec), spec.ds_type)
    else:
        found = _hub_rows(spec, name)
    if start is None and stop is None:
        yield from found
        return
    if any(bound and ("-" in bound or "%" in bound) for bound in (start, stop)):
        kept = list(found)
        yield from kept[_bound(start, len(kept)) : _bound(stop, len(kept))]
        return
    yield from islice(found, _bound(start, 0), _bound(stop, 0))


def is_local(spec: DatasetSpec) -> bool:
    """Whether `path` names files that `files` finds, not a hub id (``owner/name``).

    Raises:
        UserError: the path is a URL, or looks like a local path where nothing is.
    """
    if is_storage(spec.path):
        return True
    if is_address(spec.path):
        raise UserError(
            f"datasets: {spec.path} is a URL; download it and give the local path, a hub id, or an "
            "address of object storage (gs://, s3://)."
        )
    path = Path(spec.path).expanduser()
    if path.exists():
        return True
    if path.is_symlink():
        raise UserError(f"datasets: {spec.path} is a symbolic link that leads nowhere.")
    looks_local = spec.path.startswith((".", "/", "~")) or suffix(path) in READERS
    if looks_local or not _HUB_ID.fullmatch(spec.path):
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"datasets: {spec.path} does not exist.{did_you_mean(path.name, beside)}")
    return False


def files(spec: DatasetSpec) -> list[Path]:
    """The files of a data set that is local or on object storage (copied), sorted by name.

    Raises:
        UserError: a folder holds no data file of the wanted split, or `data_files` match none.
    """
    root = Path(spec.path).expanduser()
    if is_storage(spec.path):
        root = fetch(spec.path, "datasets")
    split = _parse_split(spec)[0]
    if split != "train" and (spec.data_files is not None or not root.is_dir()):
        raise UserError(
            f'datasets: {spec.path} is read from named files, which have only the split "train"; '
            f'split "{split}" was asked for.'
        )
    if spec.data_files is not None:
        names = (spec.data_files,) if isinstance(spec.data_files, str) else spec.data_files
        base = root if root.is_dir() else root.parent
        return [path for name in names for path in _matching(base, name)]
    if root.is_dir():
        return _folder(root, split, spec.ds_type is not None)
    return [root]


def digest(spec: DatasetSpec) -> str:
    """A digest of what the rows come from: file bytes, or the hub's fingerprint.

    With `streaming`, names, sizes and times of change of the files, or what the hub says of its.
    """
    if not is_local(spec):
        if spec.streaming:
            return f"hub:{_builder(spec).hash}"
        data = _load_hub(spec, _parse_split(spec)[0])
        return f"hub:{getattr(data, '_fingerprint', '')}:{len(data)}"
    total = hashlib.sha256()
    for path in files(spec):
        try:
            if not path.is_file():
                # A pipe would keep us waiting.
                raise UserError(f"{path}: is not a regular file.")
            if spec.streaming:
                state = path.stat()
                total.update(f"{path} {state.st_size} {state.st_mtime_ns} ".encode())
                continue
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    return total.hexdigest()


def _local_rows(paths: list[Path], kind: str | None) -> Iterator[RowOrFault]:
    for path in paths:
        yield from scan_rows(path, kind)


def _matching(base: Path, name: str) -> list[Path]:
    try:
        found = sorted(path for path in base.glob(name) if path.is_file())
    except (ValueError, NotImplementedError):
        found = []
    if not found:
        there = [path.name for path in base.iterdir()] if base.is_dir() else []
        raise UserError(f"datasets: no file {base / name}.{did_you_mean(name, there)}")
    return found


def _folder(root: Path, split: str, any_suffix: bool) -> list[Path]:
    # Our own and HF's metadata files are json too, but not rows.
    skip = {"dataset_info.json", "state.json", "dataset_dict.json"}
    found = sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and suffix(path) in READERS and path.name not in skip
    )
    if not found and any_suffix:
        found = sorted(path for path in root.rglob("[!.]*") if path.is_file())
    if not found:
        raise UserError(f"datasets: {root} holds no data file ({', '.join(READERS)}).")
    chosen = [path for path in found if _split_of(path.relative_to(root)) == split]
    if not chosen:
        there = sorted({_split_of(path.relative_to(root)) for path in found})
        raise UserError(
            f'datasets: {root} has no file of the split "{split}"; its file names say '
            f"{', '.join(there)}.{did_you_mean(split, there)}"
        )
    return chosen


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path).lower())
    for split, names in _SPLIT_WORDS.items():
        if any(word in names for word in words):
            return split
    return "train"


def _parse_split(spec: DatasetSpec) -> tuple[str, str | None, str | None]:
    match = _SPLIT.fullmatch(spec.split)
    if match is None:
        raise UserError(
            f'datasets: split "{spec.split}" of {spec.path} is not understood; '
            "expected a name or a slice like train[:100] or train[10%:]."
        )
    return match["name"], match["start"], match["stop"]


def _bound(text: str | None, total: int) -> int | None:
    if text is None:
        return None
    return int(text[:-1]) * total // 100 if text.endswith("%") else int(text)


def _hub_rows(spec: DatasetSpec, split: str) -> Iterator[Row]:
    for number, row in enumerate(_load_hub(spec, split), 1):
        yield f"{spec.path}[{split}]:row {number}", row


def _builder(spec: DatasetSpec) -> Any:
    import datasets

    files = list(spec.data_files) if isinstance(spec.data_files, tuple) else spec.data_files
    try:
        return datasets.load_dataset_builder(
            spec.path, name=spec.name, data_files=files, revision=spec.revision
        )
    except Exception as error:
        raise _not_loaded(spec, error) from error


def _not_loaded(spec: DatasetSpec, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"datasets: {spec.path} is neither a local path nor a hub data set that can be loaded: "
        f"{reason}"
    )


def _load_hub(spec: DatasetSpec, split: str) -> Any:
    import datasets

    files = list(spec.data_files) if isinstance(spec.data_files, tuple) else spec.data_files
    try:
        if spec.streaming:
            return _builder(spec).as_streaming_dataset(split=split)
        # Never code from a repository: datasets >= 4 has no trust_remote_code left to pass.
        return datasets.load_dataset(
            spec.path, name=spec.name, split=split, data_files=files, revision=spec.revision
        )
    except UserError:
        raise
    except Exception as error:
        raise _not_loaded(spec, error) from error
