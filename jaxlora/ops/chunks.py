"""Work on one large host array in pieces: bounded memory, all cores, the same bits either way."""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

# Elements worked on at once by a thread: the float32 temporaries stay in the second-level cache.
CHUNK_ELEMENTS = 1 << 17
# Elements from which compiling a program for a matrix pays: a model that has such has some dozen.
_WORTH_COMPILING = 1 << 21
_COMPILED_DTYPES = ("float32", "bfloat16", "float16")


def split(rows: int, row_elements: int, multiple: int) -> list[tuple[int, int]]:
    """Returns even row ranges of about `CHUNK_ELEMENTS` elements, cut at multiples of `multiple`.

    >>> split(rows=10, row_elements=CHUNK_ELEMENTS, multiple=4)
    [(0, 4), (4, 8), (8, 10)]
    """
    units = -(-rows // multiple)
    parts = max(1, min(units, rows * row_elements // CHUNK_ELEMENTS))
    cuts = [units * part // parts * multiple for part in range(parts)] + [rows]
    return list(itertools.pairwise(cuts))


def for_each(work: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """Calls ``work(start, stop)`` for every range, on all cores: numpy lets go of the GIL.

    Floating-point warnings are off inside: NaN and infinity are looked for in the result.
    """

    def quiet(piece: tuple[int, int]) -> None:
        # Set in the thread that does the work: numpy's error state is not inherited.
        with np.errstate(all="ignore"):
            work(*piece)

    with ThreadPoolExecutor(max(1, min(len(ranges), os.cpu_count() or 1))) as pool:
        list(pool.map(quiet, ranges))


def for_each_compiled(work: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """`for_each` of work by a jitted function: compiled once, and not in every thread."""
    for_each(work, ranges[:1])
    for_each(work, ranges[1:])


def equal_pieces(size: int, piece: int) -> list[int]:
    """Returns where pieces of one length start; the last one begins within the one before it.

    >>> equal_pieces(10, 4), equal_pieces(8, 4)
    ([0, 4, 6], [0, 4])
    """
    return [*range(0, size - piece, piece), size - piece]


def worth_compiling(matrix: np.ndarray) -> bool:
    """Returns whether a matrix is large enough for an XLA program, and a CPU can run it."""
    large = matrix.size >= _WORTH_COMPILING and matrix.dtype.name in _COMPILED_DTYPES
    return large and host_device() is not None


@functools.cache
def host_device() -> Any:
    """Returns the CPU that XLA's programs run on, None where ``JAX_PLATFORMS`` leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
