"""Which examples share a row, planned once: best-fit decreasing, or in order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_OPEN_ROWS = 8


@dataclass(frozen=True)
class Plan:
    """Row i holds the examples ``items[offsets[i]:offsets[i + 1]]``, in that order."""

    items: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.items[self.offsets[index] : self.offsets[index + 1]]


def one_each(count: int) -> Plan:
    """The plan without packing: one example a row."""
    return Plan(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def best_fit(lengths: NDArray[np.int64], capacity: int, seed: int) -> Plan:
    """Packs every example into the fullest row that still has room for it, longest first.

    The seed orders examples of equal length, so that rows mix an ordered data set.

    >>> len(best_fit(np.array([6, 5, 4, 3, 2]), 10, seed=0))
    2
    """
    assert lengths.size == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    row_of = np.empty(len(lengths), np.int64)
    # Bit c of `open_rows` says that some row has exactly c tokens of room: the fullest row that
    # fits is the lowest set bit from `length` up, one big-integer shift instead of a search.
    open_rows, rows_with = 0, [[] for _ in range(capacity + 1)]
    rows = 0
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = open_rows >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                open_rows ^= 1 << room
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of[item] = row
        left = room - length
        if left:
            rows_with[left].append(row)
            open_rows |= 1 << left
    # Within a row the shuffled order, not the longest first.
    in_row = shuffled[np.argsort(row_of[shuffled], kind="stable")]
    counts = np.bincount(row_of, minlength=rows)
    return Plan(in_row, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def in_order(lengths: NDArray[np.int64], capacity: int) -> Plan:
    """Packs the examples as they come, into the first of the last 8 rows that has room for it.

    With one open row alone a row ends where the next example does not fit, and 6 to 9 % of the
    places of GSM8K and alpaca stay empty; with 8 it is less than 2 %, and no example is placed more
    than 7 rows before one that came earlier.

    >>> plan = in_order(np.array([6, 5, 4, 3, 2]), 10)
    >>> [plan[i].tolist() for i in range(len(plan))]
    [[0, 2], [1, 3, 4]]
    """
    assert lengths.size == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    rows: list[list[int]] = []
    room: list[int] = []
    for item, length in enumerate(lengths.tolist()):
        first = max(len(rows) - _OPEN_ROWS, 0)
        row = next((i for i in range(first, len(rows)) if room[i] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= length
    counts = [len(row) for row in rows]
    items = [item for row in rows for item in row]
    return Plan(np.array(items, np.int64), np.cumsum([0, *counts], dtype=np.int64))


def packed(lengths: NDArray[np.int64], capacity: int, seed: int, *, sequential: bool) -> Plan:
    """The plan of a packed run; `sequential` keeps the order of the examples."""
    return in_order(lengths, capacity) if sequential else best_fit(lengths, capacity, seed)


def efficiency(lengths: NDArray[np.int64], rows: int, capacity: int) -> float:
    """The share of the rows' places that hold a token, 0 to 1."""
    return float(lengths.sum()) / (rows * capacity) if rows else 0.0
