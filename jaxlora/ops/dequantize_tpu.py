"""Dequantization by a Pallas kernel (TPUs): 4 bits in, 16 bits out, nothing else in memory.

XLA writes the scales out as float32, one for each element of the matrix, and the unpacked integers
too, before it multiplies them: on a TPU v6e that takes longer than the product of the matrix with
2048 tokens (benchmarks/LOG.md). The numbers are the same, bit for bit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlora.ops.arrays import CODED, FOUR_BIT, DoubleQuantized, QuantizedArray

# Groups of a block: as many rows as a tile of their scales has.
_GROUPS = 8
# Rows of a block where all rows share a scale, and how many elements a block has at most.
_ROWS, _ELEMENTS = 512, 2**19
LANES = 128
# A v5e holds int4's scales, one for each element, in its fast memory; there XLA reads as few bytes.
_INT4_CHIPS = ("TPU v6", "TPU7")
# Rows of a tile of 4-bit integers: whole ones can be taken out of a block, or a half.
_TILE_ROWS = 64


def earns(format: str, chip: str) -> bool:
    """Returns whether the kernel beats XLA on a kind of device, by benchmarks/LOG.md.

    >>> earns("nf4", "TPU v5 lite"), earns("int4", "TPU v5 lite"), earns("nf4", "cpu")
    (True, False, False)
    """
    return chip.startswith(_INT4_CHIPS if format == "int4" else "TPU")


def groups_of(leaf: QuantizedArray) -> int | None:
    """Returns how many groups of inputs a matrix has, None if the kernel cannot read it.

    It reads int4 without zero points and codes of a table, in groups of 32 or 64 n inputs.

    >>> from jaxlora.ops.quantize import quantize
    >>> [groups_of(quantize(jnp.ones((96, 8)), "int4", group_size=n)) for n in (32, 16)]
    [3, None]
    """
    if leaf.zeros is not None or leaf.groups is not None or leaf.format not in FOUR_BIT:
        return None
    by_row = leaf.scales.codes if isinstance(leaf.scales, DoubleQuantized) else leaf.scales
    if by_row.ndim != leaf.values.ndim:
        return None
    groups = by_row.shape[-1 if leaf.format in CODED else -2]
    group = leaf.shape[-2] // groups
    cut = group % _TILE_ROWS and group != _TILE_ROWS // 2 and groups > 1
    return None if cut else groups


def dequantize(
    values: Int[Array, "I O"],
    scales: Float[Array, "groups O"],
    dtype: str,
    *,
    table: np.ndarray | None = None,
    sharding: NamedSharding | None = None,
    interpret: bool = False,
) -> Float[Array, "I O"]:
    """Returns ``values * scales`` or ``table[values] * scales``, each row by its group's scales.

    Args:
      values: int4, or uint4 with a table.
      scales: one for each group of rows and column.
      dtype: of the result; the product is taken in float32 and rounded once.
      table: 16 numbers that the values stand for; None where they stand for themselves.
      sharding: of values, scales and result, on a mesh: each device unpacks its own part.
      interpret: runs the kernel in Python, on any device (tests).
    """
    lanes = lanes_of(table)
    unpack = functools.partial(
        _unpack, dtype=jnp.dtype(dtype), look_up=table is not None, interpret=interpret
    )
    scales = scales.astype(jnp.float32)
    if sharding is None:
        return unpack(values, scales, lanes)
    split = sharding.spec
    on_each_device = jax.shard_map(
        unpack,
        mesh=sharding.mesh,
        in_specs=(split, split, PartitionSpec()),
        out_specs=split,
        check_vma=False,
    )
    return on_each_device(values, scales, lanes)


def _unpack(
    values: Any, scales: Any, lanes: Any, *, dtype: Any, look_up: bool, interpret: bool
) -> Any:
    from jax.experimental import pallas as pl  # slow to import

    rows, columns = values.shape
    together = min(_GROUPS, scales.shape[0])
    group = rows // scales.shape[0] if together > 1 else min(rows, _ROWS)
    high = together * group
    wide = max(min(columns, _ELEMENTS // high) // LANES, 1) * LANES

    def kernel(codes: Any, by: Any, table: Any, out: Any) -> None:
        for number in range(together):
            at = slice(number * group, (number + 1) * group)
            numbers = table[...] if look_up else None
            out[at, :] = unpacked(codes[at, :], by[number : number + 1, :], numbers, out.dtype)

    def block(height: int, one: bool = False) -> Any:
        return pl.BlockSpec((height, wide), lambda i, j: (0 if one else i, j))

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, high), pl.cdiv(columns, wide)),
        in_specs=[
            block(high),
            block(together, one=together == 1),
            pl.BlockSpec((1, LANES), lambda i, j: (0, 0)),
        ],
        out_specs=block(high),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        interpret=interpret,
        name="look_up" if look_up else "dequantize",
    )(values, scales, lanes)


def lanes_of(table: np.ndarray | None) -> Float[Array, "1 lanes"]:
    """Returns a table as wide as a register, for `unpacked`; what is in it where there is none, no
    kernel reads.
    """
    return jnp.resize(jnp.arange(16.0) if table is None else table, (1, LANES))


def unpacked(codes: Any, by: Any, table: Any, dtype: Any) -> Any:
    """Inside a kernel: the numbers of one group of rows, ``[1, columns]`` scales."""
    whole = codes.astype(jnp.int32)
    numbers = whole.astype(jnp.float32) if table is None else _look_up(table, whole)
    return (numbers * by).astype(dtype)


def _look_up(table: Any, codes: Any) -> Any:
    """``table[codes]``; a gather is one instruction where both are as wide as a register."""
    rows = jnp.broadcast_to(table, (codes.shape[0], LANES))
    parts = [
        jnp.take_along_axis(rows, codes[:, at : at + LANES], 1, mode="promise_in_bounds")
        for at in range(0, codes.shape[1], LANES)
    ]
    return jnp.concatenate(parts, axis=1)
