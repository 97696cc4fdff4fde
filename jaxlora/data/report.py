"""The account of a preparation: what became of every row, what the tables hold."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.data.packing import efficiency, packed
from jaxlora.data.spec import DataOptions
from jaxlora.data.table import TokenTable, count_trained

TOO_LONG, TOO_SHORT = "longer than sequence_len", "shorter than min_sample_len"
NOTHING_TRAINED, EMPTY, DUPLICATE = "no trained token", "empty text", "duplicate"
TRUNCATED, DIVIDED = "truncated", "split"
"""What happened to a row that is kept; the others say why one is dropped."""


@dataclass(frozen=True)
class SourceReport:
    """What became of one data set's rows: ``kept + sum(dropped.values()) == read``.

    dropped: rows by reason; first: where the first of them is. Of the kept rows `truncated` lost
    their end, and `divided` became several examples.
    """

    path: str
    split: str
    read: int
    kept: int
    dropped: dict[str, int]
    truncated: int
    examples: int
    first: dict[str, str] = field(default_factory=dict)
    divided: int = 0


@dataclass(frozen=True)
class TableReport:
    """What one table holds; `packing_efficiency` is None where rows are not packed.

    `labels` counts the texts of each label, by name; None where there are none.
    """

    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    packing_efficiency: float | None
    labels: dict[str, int] | None = None


@dataclass(frozen=True)
class Report:
    """The account of a preparation; `cached` says that an earlier one was found.

    missed: where it was not, what differs from the most similar one, if there is any.
    """

    train_sources: tuple[SourceReport, ...]
    test_sources: tuple[SourceReport, ...]
    train: TableReport
    evaluation: TableReport | None
    cached: bool
    folder: str
    missed: tuple[str, ...] = ()


def table_report(folder: Path, options: DataOptions, packs: bool) -> dict[str, Any]:
    """A `TableReport` as plain values, from the table in a folder."""
    table = TokenTable.load(folder)
    lengths, share = table.lengths, None
    if packs:
        sequential = options.sample_packing_sequentially
        plan = packed(lengths, options.sequence_len, options.seed, sequential=sequential)
        share = efficiency(lengths, len(plan), options.sequence_len)
    counts = None
    if table.labels is not None and options.labels is not None:
        numbers = np.bincount(table.labels[:, 0], minlength=options.labels.count).tolist()
        counts = dict(zip(options.labels.shown, numbers, strict=True))
    return {
        "examples": len(table),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(count_trained(folder)),
        "longest": int(lengths.max()),
        "packing_efficiency": share,
        "labels": counts,
    }
