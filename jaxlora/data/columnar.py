"""Rows of parquet and arrow files, a batch at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.data.lines import Fault, RowOrFault, one_line


def read_parquet(path: Path) -> Iterator[RowOrFault]:
    """Rows named by their number."""
    import pyarrow.parquet

    with _arrow_errors(path), pyarrow.parquet.ParquetFile(path) as file:
        yield from _batches(path, file.iter_batches(batch_size=1000))


def read_arrow(path: Path) -> Iterator[RowOrFault]:
    """A stream, as `datasets` saves it, or a file."""
    import pyarrow as pa

    with _arrow_errors(path), pa.memory_map(str(path)) as source:
        try:
            batches: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        yield from _batches(path, batches)


def _batches(path: Path, batches: Any) -> Iterator[RowOrFault]:
    number = 0
    for batch in batches:
        # Batches of an arrow file can be of any size; Python objects are made of few rows at once.
        for start in range(0, batch.num_rows, 1000):
            part = batch.slice(start, 1000)
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError:
                rows = [_row(part, i, f"{path}:row {number + i + 1}") for i in range(part.num_rows)]
            for row in rows:
                number += 1
                yield f"{path}:row {number}", row


def _row(batch: Any, index: int, origin: str) -> dict[str, Any] | Fault:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Fault(f"{origin}: holds text that is not UTF-8; write it as UTF-8.")


class _arrow_errors:
    """Turns pyarrow's errors into one line naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException):
            raise UserError(f"{self.path}: cannot be read: {one_line(error)}") from error
