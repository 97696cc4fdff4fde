"""One file to rows: json, jsonl (plain or .gz), csv, txt, parquet, arrow; each row with its origin.

An origin is ``file:line`` (1-based) where the format has lines, else ``file:row n``.
"""

import csv
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxlora.core.errors import UserError
from jaxlora.data.columnar import read_arrow, read_parquet
from jaxlora.data.json_rows import read_json, read_jsonl
from jaxlora.data.lines import Fault, Row, RowOrFault, lines, nul, one_line


def read_rows(path: Path, kind: str | None = None) -> Iterator[Row]:
    """Yields ``(origin, columns)`` for each row of a file; blank lines are not rows.

    Raises:
        UserError: the file cannot be read, or a row of it is not a row (named by file and line).
    """
    yield from without_faults(scan_rows(path, kind))


def without_faults(rows: Iterable[RowOrFault]) -> Iterator[Row]:
    """The same rows; the first fault is raised."""
    for origin, row in rows:
        if isinstance(row, Fault):
            raise row
        yield origin, row


def scan_rows(path: Path, kind: str | None = None) -> Iterator[RowOrFault]:
    """As `read_rows`, but what is wrong with one row comes in its place, and reading goes on.

    Args:
        path: the file.
        kind: one of `KINDS`, for a file whose name does not tell its format.

    Raises:
        UserError: the file cannot be read, or breaks off.
    """
    reader = READERS.get(suffix(path)) or READERS.get(KINDS.get(kind or "", ""))
    if reader is None:
        raise UserError(
            f"{path}: data files end in {', '.join(READERS)} (text formats also with .gz); "
            "ds_type says the format of others."
        )
    try:
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file.")
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def suffix(path: Path) -> str:
    """The format suffix of a file name, without a trailing ``.gz``.

    >>> suffix(Path("a/rows.jsonl.gz"))
    '.jsonl'
    """
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_csv(path: Path) -> Iterator[RowOrFault]:
    # The csv module's own limit (131 072 characters a field) is lower than long documents need.
    csv.field_size_limit(sys.maxsize)
    faults: list[Fault] = []
    reader = csv.reader(_collecting(path, faults), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        origin = f"{path}:{start}"
        faults.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problem = Fault(f"{origin}: is not valid CSV: {error}.")
            # An open quote takes the rest of the file with it: more than one row is lost.
            if header is None or "unexpected end" in str(error):
                raise problem from error
            yield origin, problem
            continue
        if cells is None:
            return
        if header is None and (faults or cells):
            header = _header(cells, path, faults)
        elif faults:
            yield origin, faults[0]
        elif cells and header is not None:
            yield origin, _cells(cells, header, origin)


def _collecting(path: Path, faults: list[Fault]) -> Iterator[str]:
    """The lines of a file; what is wrong with one is added to `faults`."""
    for origin, line, fault in lines(path):
        fault = fault or nul(line, origin)
        if fault is not None:
            faults.append(fault)
        yield line.replace("\0", "")


def _cells(cells: list[str], header: list[str], origin: str) -> dict[str, str] | Fault:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return Fault(
        f"{origin}: has {len(cells)} fields, the header has {len(header)} ({', '.join(header)})."
    )


def _header(cells: list[str], path: Path, faults: list[Fault]) -> list[str]:
    if faults:
        raise faults[0]
    if len(set(cells)) != len(cells):
        raise UserError(f"{path}:1: a column name appears twice in the header: {', '.join(cells)}.")
    return cells


def _read_txt(path: Path) -> Iterator[RowOrFault]:
    for origin, line, fault in lines(path):
        fault = fault or nul(line, origin)
        text = line.rstrip("\r\n")
        if fault is not None:
            yield origin, fault
        elif text.strip():
            yield origin, {"text": text}


READERS: dict[str, Callable[[Path], Iterator[RowOrFault]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_txt,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
KINDS = {"json": ".json", "csv": ".csv", "parquet": ".parquet", "text": ".txt", "arrow": ".arrow"}
"""What `ds_type` calls a format: its suffix."""
