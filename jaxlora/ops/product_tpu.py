"""Products with a 4-bit matrix by a Pallas kernel (TPUs): in 16 bits it never lies in memory.

A block of it is unpacked, 256 columns ahead of those that the matrix units multiply, and a low-rank
product is added into the same float32 sum. The matrix has the numbers, bit for bit, that
`jaxlora.ops.dequantize_tpu` writes; the sum is rounded once, where two products that are added up
afterwards are rounded three times. What it saves is in benchmarks/LOG.md.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlora.ops.dequantize_tpu import LANES, lanes_of, unpacked

# Columns that a matrix unit holds: half of them take it as long.
PIECE = 256
# Sides of a block at most: of the matrix, and tokens, each block of which unpacks the matrix anew.
_SIDE, _TOKENS = 1024, 2048
# Rows of a tile of 16-bit numbers, and of a tile of scales.
_TILE_TOKENS, _TILE_SCALES = 16, 8
# With fewer tokens unpacking is no longer hidden behind the product: not estimated.
_FEWEST_TOKENS = 512
# A rank beyond is more than one more pass of the matrix units.
_MOST_RANK = PIECE
# Bytes of fast memory: blocks read ahead, sums and result take 31 MiB with the largest blocks.
_FAST_MEMORY = 48 * 2**20
# libtpu has no profile of a kernel for v7x, so nothing says what it gains there.
_CHIPS = ("TPU v6",)


def earns(chip: str) -> bool:
    """Returns whether the kernel beats unpacking first on a kind of device, by benchmarks/LOG.md.

    >>> earns("TPU v6 lite"), earns("TPU v5 lite"), earns("cpu")
    (True, False, False)
    """
    return chip.startswith(_CHIPS)


def block_of(shape: tuple[int, int], group: int) -> tuple[int, int] | None:
    """Returns rows and columns of a block of a matrix, None if none divides it.

    >>> block_of((4096, 14336), 64), block_of((3584, 512), 64), block_of((4096, 14400), 64)
    ((1024, 1024), (512, 512), None)
    """
    rows, columns = shape
    if PIECE % group:
        return None
    high = _largest(rows, max(PIECE, _TILE_SCALES * group))
    wide = _largest(columns, PIECE)
    return (high, wide) if high and wide else None


def _largest(size: int, step: int) -> int | None:
    return next((side for side in range(_SIDE // step * step, 0, -step) if not size % side), None)


def serves(tokens: int, shape: tuple[int, int], group: int, rank: int = 0) -> bool:
    """Returns whether so many tokens are multiplied with such a matrix and pair by the kernel."""
    return tokens >= _FEWEST_TOKENS and rank <= _MOST_RANK and block_of(shape, group) is not None


def product(
    x: Float[Array, "M I"],
    values: Int[Array, "K N"],
    scales: Float[Array, "groups N"],
    pair: tuple[Float[Array, "M R"], Float[Array, "..."]] | None = None,
    *,
    table: np.ndarray | None = None,
    turned: bool = False,
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """Returns ``x @ W + h @ b``, of W as `dequantize_tpu.dequantize` reads it; no gradient.

    Args:
      x: bfloat16, ``[M, K]``.
      values: int4, or uint4 with a table.
      scales: one for each group of rows and column.
      pair: `h` and ``b [R, N]``; None for the product alone.
      table: 16 numbers that the values stand for; None where they stand for themselves.
      turned: gives ``x @ W.T + h @ b.T`` of ``x [M, N]`` and ``b [K, R]``.
      interpret: runs the kernel in Python, on any device (tests).
    """
    from jax.experimental import pallas as pl  # slow to import
    from jax.experimental.pallas import tpu as pltpu

    group, coded = values.shape[0] // scales.shape[0], table is not None
    block = block_of((values.shape[0], values.shape[1]), group)
    assert block is not None, (values.shape, group)
    summed, kept = (1, 0) if turned else (0, 1)  # axes of the matrix
    high, steps = _tokens_of_a_block(x.shape[0]), values.shape[summed] // block[summed]

    def of_matrix(i: Any, j: Any, k: Any) -> tuple[Any, Any]:
        return (j, k) if turned else (k, j)

    in_specs = [
        pl.BlockSpec((high, block[summed]), lambda i, j, k: (i, k)),
        pl.BlockSpec(block, of_matrix),
        pl.BlockSpec((block[0] // group, block[1]), of_matrix),
        pl.BlockSpec((1, LANES), lambda i, j, k: (0, 0)),
    ]
    if pair is not None:
        rank = pair[0].shape[1]
        in_specs.append(pl.BlockSpec((high, rank), lambda i, j, k: (i, 0)))
        if turned:
            in_specs.append(pl.BlockSpec((block[kept], rank), lambda i, j, k: (j, 0)))
        else:
            in_specs.append(pl.BlockSpec((rank, block[kept]), lambda i, j, k: (0, j)))
    return pl.pallas_call(
        functools.partial(_add_up, steps=steps, group=group, coded=coded, turned=turned),
        grid=(pl.cdiv(x.shape[0], high), values.shape[kept] // block[kept], steps),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((high, block[kept]), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], values.shape[kept]), x.dtype),
        scratch_shapes=[pltpu.VMEM((high, block[kept]), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_FAST_MEMORY,
        ),
        interpret=interpret,
        name=_name(coded, turned),
    )(x, values, scales.astype(jnp.float32), lanes_of(table), *(pair or ()))


def _name(coded: bool, turned: bool) -> str:
    return ("look_up_" if coded else "") + "product" + ("_turned" if turned else "")


def _tokens_of_a_block(tokens: int) -> int:
    """As many as all blocks but the last have: they are about as large."""
    even = -(-tokens // -(-tokens // _TOKENS))
    return min(-(-even // _TILE_TOKENS) * _TILE_TOKENS, tokens)


def _add_up(
    x: Any,
    codes: Any,
    by: Any,
    table: Any,
    *rest: Any,
    steps: int,
    group: int,
    coded: bool,
    turned: bool,
) -> None:
    """The kernel: one block's share of the sums; the pair's comes first, the last is written."""
    from jax.experimental import pallas as pl

    *pair, out, sums = rest
    sides = ((1,), (1,)) if turned else ((1,), (0,))

    def dot(left: Any, right: Any) -> Any:
        return jax.lax.dot_general(
            left, right, (sides, ((), ())), preferred_element_type=jnp.float32
        )

    def matrix(at: slice) -> Any:
        rows, columns = (at, slice(None)) if turned else (slice(0, codes.shape[0]), at)
        groups = [
            unpacked(
                codes[start : start + group, columns],
                by[start // group : start // group + 1, columns],
                numbers,
                x.dtype,
            )
            for start in range(rows.start, rows.stop, group)
        ]
        return jnp.concatenate(groups, axis=0)

    numbers = table[...] if coded else None
    pieces = [slice(at, at + PIECE) for at in range(0, out.shape[1], PIECE)]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sums[...] = dot(pair[0][...], pair[1][...]) if pair else jnp.zeros_like(sums)

    ahead = matrix(pieces[0])
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        # Unpacked before the product that does not need it: in this order the two overlap.
        here, ahead = ahead, None if following is None else matrix(following)
        sums[:, piece] += dot(x[...], here)

    @pl.when(pl.program_id(2) == steps - 1)
    def _() -> None:
        out[...] = sums[...].astype(out.dtype)
