"""How long the examples of a table are: a histogram, as numbers and as text."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BAR = 40


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` examples have from ``edges[i]`` to ``edges[i + 1] - 1`` tokens."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


def histogram(lengths: NDArray[np.int64], bins: int = 12) -> Histogram:
    """Counts examples by length, in bins of one width that starts with 1, 2 or 5.

    >>> histogram(np.array([1, 9, 10, 25]), bins=3)
    Histogram(edges=(0, 10, 20, 30), counts=(2, 1, 1))
    """
    longest = int(lengths.max())
    widths = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    width = next(each for each in widths if each * bins > longest)
    edges = range(0, longest // width * width + 2 * width, width)
    return Histogram(tuple(edges), tuple(np.histogram(lengths, edges)[0].tolist()))


def as_text(found: Histogram) -> str:
    """The histogram as lines of bars."""
    most, right = max(found.counts), len(str(found.edges[-1] - 1))
    lines = []
    for i, count in enumerate(found.counts):
        bar = "#" * -(-_BAR * count // most)
        low, high = found.edges[i], found.edges[i + 1] - 1
        lines.append(f"{low:>{right}} to {high:>{right}} tokens  {bar:<{_BAR}} {count:,}")
    return "\n".join(lines)
