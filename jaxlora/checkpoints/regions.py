"""The part of a matrix that one process of several needs, and its place in what stores the whole.

Host buffers have the shape of the whole leaf: memory that nothing is written to is never there.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxlora.ops import integer
from jaxlora.ops.arrays import CODED, QuantizedArray

_BLOCK = 64  # elements of a coded format that share a scale


@dataclasses.dataclass(frozen=True)
class Region:
    """A box of a matrix ``[*outer, in, out]``.

    Attributes:
      shape: of the whole matrix.
      box: start and stop of each dimension.
      ways: into how many equal parts each dimension is split over the devices.
    """

    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    ways: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return all(part == (0, size) for part, size in zip(self.box, self.shape, strict=True))

    def holds(self, number: int) -> bool:
        """Whether a number of the first dimension lies in it."""
        start, stop = self.box[0]
        return start <= number < stop

    def inner(self) -> "Region":
        """Returns the region without its first dimension."""
        return Region(self.shape[1:], self.box[1:], self.ways[1:])

    def of(self, matrix: np.ndarray) -> np.ndarray:
        """Returns the box of a matrix; a view."""
        return matrix[tuple(slice(*part) for part in self.box)]

    def quantized(self, format: str, group_size: int, *, double_quant: bool) -> "Region":
        """Returns the smallest box around this one that can be quantized by itself.

        Its numbers are then those of the whole matrix: no scale is shared with what is outside, and
        every array that stores it is split over the devices as the matrix is.
        """
        *_, rows, columns = self.shape
        group = rows
        if format == "int4":
            group = integer.group_length(rows, group_size)
        elif format in CODED and rows % _BLOCK == 0:
            group = _BLOCK
        alike = not (format in CODED and (double_quant or rows % _BLOCK))
        split = alike and group % 2 == 0 and (rows // group) % self.ways[-2] == 0
        into = self.box[-2] if split else (0, rows)
        out = self.box[-1] if alike else (0, columns)
        if split:
            into = (into[0] // group * group, min(-(-into[1] // group) * group, rows))
        return dataclasses.replace(self, box=(*self.box[:-2], into, out))

    def along(self, axis: int) -> "Region | None":
        """Returns the box that is as this one along `axis` and whole along the others; None for
        all: what is quantized with a scale for each index of `axis` needs the others whole."""
        box = tuple(
            part if at == axis else (0, size)
            for at, (part, size) in enumerate(zip(self.box, self.shape, strict=True))
        )
        region = dataclasses.replace(self, box=box)
        return None if region.is_whole else region

    def index(self, leaf: Any, part: np.ndarray) -> tuple[slice, ...]:
        """Returns where `part`, an array of a leaf of the box, lies in that of the whole leaf."""
        return tuple(
            slice(start * size // (stop - start), start * size // (stop - start) + size)
            for size, (start, stop), _ in self._dimensions(leaf, part)
        )

    def full_shape(self, leaf: Any, part: np.ndarray) -> tuple[int, ...]:
        """Returns the shape of that array in the whole leaf."""
        return tuple(
            size * whole // (stop - start)
            for size, (start, stop), whole in self._dimensions(leaf, part)
        )

    def _dimensions(self, leaf: Any, part: np.ndarray) -> list[tuple[int, tuple[int, int], int]]:
        """Size, box and whole size of what each dimension of `part` counts."""
        boxes = list(zip(self.box, self.shape, strict=True))
        if isinstance(leaf, QuantizedArray):
            if part.ndim != leaf.values.ndim:  # scales of a flat row: the matrix is whole
                boxes = boxes[:-2] + [((0, 1), 1)] * (part.ndim - len(boxes) + 2)
            elif leaf.format in CODED:
                boxes[-2:] = boxes[:-3:-1]
        return [(size, *box) for size, box in zip(part.shape, boxes, strict=True)]
