"""Integer formats: int4 per group of inputs, int8 per output channel.

What we make has no zero point; what GPTQ, AWQ and their kin made may have one for each group.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxlora.core.errors import UserError
from jaxlora.ops import clip_search
from jaxlora.ops.arrays import take_rows
from jaxlora.ops.chunks import for_each, split


def group_length(in_dim: int, group_size: int) -> int:
    """Returns `group_size` where it divides `in_dim`, else its largest divisor from 16 up to it.

    Without such a divisor a whole column is one group.

    >>> group_length(4096, 64), group_length(1080, 64), group_length(97, 64)
    (64, 60, 97)
    """
    if in_dim % group_size == 0:
        return group_size
    divisors = [n for n in range(min(group_size, in_dim), 15, -1) if in_dim % n == 0]
    return divisors[0] if divisors else in_dim


def quantize_int4(
    weight: Float[np.ndarray, "I O"], *, group_size: int
) -> tuple[Int[np.ndarray, "I O"], Float[np.ndarray, "groups O"]]:
    """Returns int4 values in [-8, 7] and one scale per group of inputs and output.

    The scale is signed, so that a group's largest magnitude can fall on -8 whatever its sign:
    one level more than [-7, 7] (RMSE 0.091 instead of 0.100 on N(0, 1), groups of 64). It is a
    number of bfloat16, in which its product with a code is rounded once, as in float32.
    """
    in_dim, out_dim = weight.shape
    group = group_length(in_dim, group_size)
    values = np.empty((in_dim, out_dim), jnp.int4)
    scales = np.empty((in_dim // group, out_dim), jnp.bfloat16)
    if clip_search.are_many(weight, group):
        clip_search.search_many(weight, values, scales)
        return values, scales

    def work(start: int, stop: int) -> None:
        columns = weight[:, start:stop].reshape(-1, group, stop - start).swapaxes(0, 1)
        codes, scales[:, start:stop] = clip_search.search(np.array(columns, np.float32, order="C"))
        values[:, start:stop] = codes.swapaxes(0, 1).reshape(in_dim, -1)

    # At least two columns at a time: numpy sums a lone column in another order.
    for_each(work, split(out_dim, in_dim, 2))
    return values, scales


def quantize_int8(
    weight: Float[np.ndarray, "I O"],
) -> tuple[Int[np.ndarray, "I O"], Float[np.ndarray, "1 O"]]:
    """Returns LLM.int8's values (Dettmers et al. 2022) and its ``SCB / 127``.

    SCB is the largest magnitude that feeds an output, after a cast to float16 as in bitsandbytes;
    ``float16(127 * scale)`` gives it back exactly.

    Raises:
      UserError: a finite weight is beyond the range of float16.
    """
    in_dim, out_dim = weight.shape
    values = np.empty((in_dim, out_dim), np.int8)
    largest = np.empty((1, out_dim), np.float32)

    def work(start: int, stop: int) -> None:
        rows = weight[:, start:stop].T.astype(np.float16).astype(np.float32, order="C")
        row_max = np.abs(rows).max(axis=1)
        largest[0, start:stop] = row_max
        inverse = np.divide(np.float32(127), row_max, out=np.zeros_like(row_max), where=row_max > 0)
        values[:, start:stop] = np.rint(rows * inverse[:, None]).T

    for_each(work, split(out_dim, in_dim, 1))
    if np.isinf(largest).any() and np.isfinite(weight[:, np.isinf(largest[0])]).all():
        raise UserError("int8 stores float16 magnitudes, at most 65504, and a weight is larger.")
    return values, largest / np.float32(127)


def dequantize(
    values: Int[Array, "*lead I O"],
    scales: Float[Array, "*lead groups O"],
    dtype: str,
    *,
    zeros: Int[Array, "*lead groups O"] | None = None,
    groups: Int[Array, "*lead I"] | None = None,
) -> Float[Array, "*lead I O"]:
    """Returns ``(values - zeros) * scales``, each input by its group; jittable, any leading axes.

    Args:
      values: int4 or int8.
      scales: one group's scale for each output; int8 of LLM.int8 has one group.
      dtype: of the result; the product is taken as in float32 and rounded once.
      zeros: as `scales`; None for 0.
      groups: group of each input; None where groups are equal runs of inputs.
    """
    *lead, _, out_dim = values.shape
    # Codes, and their distances to a zero, are numbers of bfloat16: where the scales are too, the
    # product is rounded once in it as well, and nothing of twice the size is formed.
    exact = scales.dtype == jnp.bfloat16 == jnp.dtype(dtype)
    wide = jnp.bfloat16 if exact else jnp.float32
    numbers, scales = values.astype(wide), scales.astype(wide)
    if groups is not None:
        if zeros is not None:
            numbers -= take_rows(zeros, groups).astype(wide)
        return (numbers * take_rows(scales, groups)).astype(dtype)
    numbers = numbers.reshape(*lead, scales.shape[-2], -1, out_dim)
    if zeros is not None:
        numbers -= zeros[..., None, :].astype(wide)
    return (numbers * scales[..., None, :]).reshape(values.shape).astype(dtype)


def pack(values: Int[np.ndarray, "*lead I O"]) -> UInt8[np.ndarray, "*lead half_I O"]:
    """Returns host int4 values two a byte, the even input in the low nibble.

    >>> pack(np.array([[1], [-1]], jnp.int4))
    array([[241]], dtype=uint8)
    """
    nibbles = values.view(np.uint8)
    packed = nibbles[..., 1::2, :] << np.uint8(4)
    packed |= nibbles[..., 0::2, :] & np.uint8(15)
    return packed


def unpack(packed: UInt8[Array, "*lead half_I O"]) -> Int[Array, "*lead I O"]:
    """Returns the int4 values that `pack` packed; jittable.

    >>> unpack(jnp.array([[241]], "uint8")).tolist()
    [[1], [-1]]
    """
    *lead, half, out_dim = packed.shape
    signed = packed.astype(jnp.int8)
    pairs = jnp.stack([signed << 4 >> 4, signed >> 4], axis=-2)
    return pairs.reshape(*lead, 2 * half, out_dim).astype(jnp.int4)
