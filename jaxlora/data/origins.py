"""Where the examples of a table come from: ``file:line``, found again by reading the rows."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxlora.core.errors import UserError
from jaxlora.data.report import Report
from jaxlora.data.sources import scan
from jaxlora.data.spec import DatasetSpec

_FILE = "rows.int64"


def write_row_numbers(folder: Path, row_of: NDArray[np.int64]) -> None:
    """Keeps the row of each example beside its table, counted from 1 over all data sets."""
    row_of.astype("<i8").tofile(folder / _FILE)


def origins(report: Report, specs: Sequence[DatasetSpec], examples: Sequence[int]) -> list[str]:
    """Returns the origins of training examples, sorted by row; a row with several comes once.

    Reads the data sets up to the last of the rows, without tokenizing them.

    Args:
      report: of the preparation.
      specs: of the training data.
      examples: their numbers in the table.
    """
    rows = np.fromfile(Path(report.folder) / "train" / _FILE, "<i8")
    wanted = sorted({int(rows[example]) for example in examples})
    try:
        found = _read(report, specs, set(wanted))
    except UserError:  # files that have gone or changed since: better a number than nothing
        found = {}
    return [found.get(row, f"row {row} of the training data") for row in wanted]


def _read(report: Report, specs: Sequence[DatasetSpec], wanted: set[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for number, origin in enumerate(_all(report, specs), 1):
        if number in wanted:
            found[number] = origin
            if len(found) == len(wanted):
                break
    return found


def _all(report: Report, specs: Sequence[DatasetSpec]) -> Iterator[str]:
    for spec, source in zip(specs, report.train_sources, strict=True):
        for origin, _ in islice(scan(spec), source.read):
            yield origin
