"""One file to rows: json, jsonl (plain or .gz), csv, txt, parquet, arrow; each row with its origin.

An origin is ``file:line`` (1-based) where the format has lines, else ``file:row n``.
"""

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxlora.core.errors import UserError

Row = tuple[str, dict[str, Any]]


def read_rows(path: Path) -> Iterator[Row]:
    """Yields ``(origin, columns)`` for each row of a file; blank lines are not rows.

    Raises:
        UserError: the file cannot be read, or a row of it is not a row (named by file and line).
    """
    reader = READERS.get(suffix(path))
    if reader is None:
        raise UserError(
            f"{path}: data files end in {', '.join(READERS)} (text formats also with .gz)."
        )
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file.")
    try:
        yield from reader(path)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from error


def suffix(path: Path) -> str:
    """The format suffix of a file name, without a trailing ``.gz``.

    >>> suffix(Path("a/rows.jsonl.gz"))
    '.jsonl'
    """
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ``(origin, text)`` per line, decoded strictly so that a bad byte is named."""
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            origin = f"{path}:{number}"
            if number == 1:
                raw = _without_mark(raw, path)
            yield origin, _decode(raw, origin)


def _without_mark(raw: bytes, path: Path) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1: the file is UTF-16; save it as UTF-8.")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _decode(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    for origin, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise UserError(f"{origin}: is not valid JSON: {reason}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin}: is not valid JSON: {_one_line(error)}.") from error
        yield origin, _object(value, origin)


def _read_json(path: Path) -> Iterator[Row]:
    """A ``.json`` file is an array of objects, or one object per line."""
    with _open(path) as file:
        raw = _without_mark(file.read(), path)
    if not raw.lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; save the file as UTF-8.") from error
    yield from _array(text, path)


def _array(text: str, path: Path) -> Iterator[Row]:
    """Reads element by element, so that each one has its line."""
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        origin = f"{path}:{line}"
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}"
            raise UserError(f"{where}: is not valid JSON: {error.msg}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin}: is not valid JSON: {_one_line(error)}.") from error
        yield origin, _object(value, origin)
        position = _skip(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]") or not separator:
            at = text.count("\n", 0, position) + 1
            raise UserError(f"{path}:{at}: is not valid JSON: expected ',' or ']' after a row.")
        if separator == ",":
            position = _skip(text, position + 1)
    end = _skip(text, position + 1)
    if end < len(text):
        at = text.count("\n", 0, end) + 1
        raise UserError(f"{path}:{at}: is not valid JSON: text after the closing ']'.")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" appears twice')
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f'{origin}: a row must be an object like {{"column": ...}}, got {kind}.')
    return value


def _read_csv(path: Path) -> Iterator[Row]:
    # The csv module's own limit (131 072 characters a field) is lower than long documents need.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{start}: is not valid CSV: {error}.") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, path)
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{path}:{start}: has {len(cells)} fields, the header has {len(header)} "
                f"({', '.join(header)})."
            )
        yield f"{path}:{start}", dict(zip(header, cells, strict=True))


def _header(cells: list[str], path: Path) -> list[str]:
    if len(set(cells)) != len(cells):
        raise UserError(f"{path}:1: a column name appears twice in the header: {', '.join(cells)}.")
    return cells


def _read_txt(path: Path) -> Iterator[Row]:
    for origin, line in _lines(path):
        text = line.rstrip("\r\n")
        if text.strip():
            yield origin, {"text": text}


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with _arrow_errors(path), pyarrow.parquet.ParquetFile(path) as file:
        yield from _batches(path, file.iter_batches(batch_size=1000))


def _read_arrow(path: Path) -> Iterator[Row]:
    import pyarrow as pa

    with _arrow_errors(path), pa.memory_map(str(path)) as source:
        try:
            batches: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        yield from _batches(path, batches)


def _batches(path: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", row


class _arrow_errors:
    """Turns pyarrow's errors into one line naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException):
            raise UserError(f"{self.path}: cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
