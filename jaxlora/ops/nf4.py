"""NF4 with double quantization (QLoRA, Dettmers et al. 2023), bit for bit as bitsandbytes on a CPU.

A matrix is read as its ``[out, in]`` transpose, row-major, in blocks of 64 that run on across row
ends; each block keeps its largest magnitude, and each element the nearest of 16 codes times that.
Other tables of 16 numbers (`TABLES`) in the same storage are read, not made.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt, UInt8

from jaxlora.core.errors import UserError
from jaxlora.ops.arrays import DoubleQuantized, take_rows
from jaxlora.ops.chunks import for_each, split
from jaxlora.ops.nf4_blocks import (
    BLOCK,
    CODEBOOK,
    are_many,
    hex_floats,
    quantize_blocks,
    quantize_many,
)

NESTED_BLOCK = 256

# bitsandbytes' FP4: sign, two bits of exponent, one of mantissa, over the largest (12); -0 is 8.
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
# The elements of OCP's Microscaling Formats (MX) v1.0, E2M1: the sign is the highest bit.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)

# The number each code of a format stands for, before its block's scale.
TABLES: dict[str, np.ndarray] = {
    "nf4": CODEBOOK,
    "fp4": np.concatenate([_FP4, -_FP4]),
    "mxfp4": np.concatenate([_E2M1, -_E2M1]),
}

# The positive half of bitsandbytes' signed dynamic map. Literals, because recomputing it outside
# torch is off by one unit in the last place.
_DYNAMIC_POSITIVE = hex_floats("""
    0x1.27476ep-21 0x1.b43528p-19 0x1.040bfep-17 0x1.64840cp-16 0x1.6f0068p-15 0x1.15df66p-14
    0x1.743e96p-14 0x1.47ae16p-13 0x1.19ce0ap-12 0x1.8fc506p-12 0x1.02de02p-11 0x1.3dd982p-11
    0x1.78d5p-11 0x1.b3d07cp-11 0x1.eecbfep-11 0x1.4fdf3ap-10 0x1.e353f8p-10 0x1.3b645ap-9
    0x1.851eb8p-9 0x1.ced914p-9 0x1.0c49bap-8 0x1.3126e8p-8 0x1.56041ap-8 0x1.7ae148p-8
    0x1.9fbe76p-8 0x1.c49ba6p-8 0x1.e978d4p-8 0x1.072b02p-7 0x1.19999ap-7 0x1.2c083p-7
    0x1.3e76c8p-7 0x1.75c29p-7 0x1.d1eb86p-7 0x1.170a3ep-6 0x1.451ebap-6 0x1.733334p-6
    0x1.a147aep-6 0x1.cf5c2ap-6 0x1.fd70a4p-6 0x1.15c29p-5 0x1.2ccccep-5 0x1.43d70ap-5
    0x1.5ae146p-5 0x1.71eb86p-5 0x1.88f5c2p-5 0x1.ap-5 0x1.b70a3ep-5 0x1.ce147ap-5
    0x1.e51ebap-5 0x1.fc28f6p-5 0x1.09999ap-4 0x1.151ebap-4 0x1.20a3d6p-4 0x1.2c28f6p-4
    0x1.37ae14p-4 0x1.433334p-4 0x1.4eb854p-4 0x1.5a3d7p-4 0x1.65c29p-4 0x1.7147aep-4
    0x1.7ccccep-4 0x1.8851eep-4 0x1.93d70ap-4 0x1.b66668p-4 0x1.fp-4 0x1.14ccccp-3
    0x1.31999ap-3 0x1.4e6666p-3 0x1.6b3334p-3 0x1.88p-3 0x1.a4ccccp-3 0x1.c1999ap-3
    0x1.de6666p-3 0x1.fb3332p-3 0x1.0cp-2 0x1.1a6668p-2 0x1.28ccccp-2 0x1.373334p-2
    0x1.459998p-2 0x1.54p-2 0x1.626666p-2 0x1.70ccccp-2 0x1.7f3334p-2 0x1.8d9998p-2
    0x1.9cp-2 0x1.aa6666p-2 0x1.b8ccccp-2 0x1.c73334p-2 0x1.d59998p-2 0x1.e4p-2
    0x1.f26664p-2 0x1.006666p-1 0x1.079998p-1 0x1.0eccccp-1 0x1.16p-1 0x1.1d3334p-1
    0x1.246668p-1 0x1.2b999ap-1 0x1.32ccccp-1 0x1.3ap-1 0x1.413334p-1 0x1.486668p-1
    0x1.4f999ap-1 0x1.56ccccp-1 0x1.5ep-1 0x1.653334p-1 0x1.6c6668p-1 0x1.73999ap-1
    0x1.7accccp-1 0x1.82p-1 0x1.893334p-1 0x1.906666p-1 0x1.97999ap-1 0x1.9eccccp-1
    0x1.a6p-1 0x1.ad3334p-1 0x1.b46666p-1 0x1.bb999ap-1 0x1.c2ccccp-1 0x1.cap-1
    0x1.d13334p-1 0x1.d86666p-1 0x1.df999ap-1 0x1.e6ccccp-1 0x1.eep-1 0x1.f53334p-1
    0x1.fc6666p-1
""")
DYNAMIC_MAP = np.concatenate([-_DYNAMIC_POSITIVE[::-1], [0.0], _DYNAMIC_POSITIVE, [1.0]]).astype(
    np.float32
)


def quantize(
    weight: Float[np.ndarray, "I O"], *, double_quant: bool
) -> tuple[UInt8[np.ndarray, "O half_I"], Float[np.ndarray, "..."] | DoubleQuantized]:
    """Returns packed codes and block scales (``[out, in / 64]``, or flat when 64 cuts rows).

    Raises:
      UserError: ``in`` is odd (a byte would straddle two rows).
    """
    in_dim, out_dim = weight.shape
    if in_dim % 2:
        raise UserError(
            f"nf4 packs two inputs into a byte, but in={in_dim} is odd; use int4 or int8 for it."
        )
    values = np.empty((out_dim, in_dim // 2), np.uint8)
    absmax = np.empty(-(-out_dim * in_dim // BLOCK), np.float32)
    matrix = weight.T
    if are_many(matrix):
        quantize_many(matrix.reshape(-1, BLOCK), values.reshape(-1, BLOCK // 2), absmax)
    else:
        _quantize_rows(matrix, values.reshape(-1), absmax)
    scales = absmax.reshape(out_dim, -1) if in_dim % BLOCK == 0 else absmax
    return values, _double_quantize(scales) if double_quant else scales


def _quantize_rows(
    matrix: Float[np.ndarray, "O I"],
    packed: UInt8[np.ndarray, " half"],
    absmax: Float[np.ndarray, " blocks"],
) -> None:
    """Fills `packed` and `absmax`, a few rows at a time."""
    in_dim = matrix.shape[1]

    def work(start: int, stop: int) -> None:
        first, last = start * in_dim, stop * in_dim
        flat = np.ascontiguousarray(matrix[start:stop], np.float32).reshape(-1)
        blocks = slice(first // BLOCK, -(-last // BLOCK))
        packed[first // 2 : last // 2], absmax[blocks] = quantize_blocks(flat)

    # Cut where a row end is also a block end, so that the cuts cannot be seen in the result.
    for_each(work, split(len(matrix), in_dim, BLOCK // math.gcd(in_dim, BLOCK)))


def _double_quantize(scales: np.ndarray) -> DoubleQuantized:
    """Quantizes scales less their mean, in blocks of 256, to the nearest entry of `DYNAMIC_MAP`."""
    with np.errstate(all="ignore"):  # NaN and infinity are the caller's to find, in `offset`
        offset = _mean(scales.reshape(-1))
        centred = scales.reshape(-1) - offset
        padding = -centred.size % NESTED_BLOCK
        blocks = np.pad(centred, (0, padding)).reshape(-1, NESTED_BLOCK)
        absmax = np.abs(blocks).max(axis=1)
        scaled = blocks * (np.float32(1) / absmax)[:, None]
    # fmax turns the 0 / 0 of a constant block into -1, whose code bitsandbytes gives it too.
    unit = (np.fmin(np.fmax(scaled, -1), 1) + np.float32(1)) * np.float32(0.5)
    # bitsandbytes fuses this multiply and add; at none of the map's 248 thresholds does it matter.
    index = (unit * np.float32(65535) + np.float32(0.5)).astype(np.int32)
    codes = _nearest_dynamic_code()[index].reshape(-1)[: centred.size]
    return DoubleQuantized(codes.reshape(scales.shape), absmax, np.asarray(offset))


@functools.cache
def _nearest_dynamic_code() -> np.ndarray:
    """Code of each of 65536 even steps over [-1, 1]: bitsandbytes' CPU quantizer rounds to them."""
    steps = np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535) - np.float32(1)
    midpoints = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) * np.float32(0.5)
    return np.searchsorted(midpoints, steps, side="left").astype(np.uint8)


def _mean(x: np.ndarray) -> np.float32:
    """The float32 mean as torch sums it on one CPU thread: 8 lanes, 4 in flight, then a cascade.

    On several threads torch splits 32768 or more elements by the number of threads, so that its
    own result then depends on the machine by a few units in the last place.
    """
    width = 8 if x.size >= 8 else 1
    rows = x[: x.size // width * width].reshape(-1, width)
    flights = len(rows) // 4
    lanes = _cascade(rows[: flights * 4].reshape(flights, 4 * width)).reshape(4, width)
    partial = lanes[0]
    for row in [*rows[flights * 4 :], *lanes[1:]]:
        partial = partial + row
    total = np.float32(0)
    for value in [*x[rows.size :], *partial]:
        total = total + value
    return np.float32(total / np.float32(x.size))


def _cascade(rows: np.ndarray) -> np.ndarray:
    """Sums rows in order, carrying over into 3 coarser sums every 2**power rows, as torch does."""
    power = max(4, max(1, (len(rows) - 1).bit_length()) // 4)
    step = 1 << power
    levels = np.zeros((4, rows.shape[1]), np.float32)
    runs = rows[: len(rows) // step * step].reshape(-1, step, rows.shape[1])
    sums = np.zeros((len(runs), rows.shape[1]), np.float32)
    for row in range(step):
        sums += runs[:, row]
    for count, run in enumerate(sums, start=1):
        levels[1] += run
        for level in (2, 3):
            if count >> (level - 2) * power & step - 1:
                break
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
    for row in rows[len(runs) * step :]:
        levels[0] += row
    return levels[0] + levels[1] + levels[2] + levels[3]


def dequantize(
    values: UInt8[Array, "*lead O half_I"],
    scales: Float[Array, "..."] | DoubleQuantized,
    dtype: str,
    *,
    table: np.ndarray = CODEBOOK,
) -> Float[Array, "*lead I O"]:
    """The inverse of `quantize`, jittable, with any leading axes; `table` is one of `TABLES`."""
    *lead, out_dim, half = values.shape
    rows = scales.codes if isinstance(scales, DoubleQuantized) else scales
    # Scales that keep the rows apart tell the block's size; flat ones have blocks of 64.
    block = half * 2 // rows.shape[-1] if rows.ndim == values.ndim else BLOCK
    if isinstance(scales, DoubleQuantized):
        # The barrier keeps them one number a block: fused, each of its 64 elements computes it.
        scales = jax.lax.optimization_barrier(block_scales(scales, len(lead)))
    # Broadcast shifts, not two halves put together: XLA concatenates two numbers at a time.
    codes = values[..., None] >> jnp.array([4, 0], jnp.uint8) & 15
    numbers = _look_up(codes, table).reshape(*lead, out_dim * half * 2)
    absmax = jnp.asarray(scales).reshape(*lead, -1)
    if numbers.shape[-1] % block == 0:
        numbers = numbers.reshape(*lead, -1, block) * absmax[..., None]
    else:
        numbers *= jnp.repeat(absmax, block, axis=-1)[..., : numbers.shape[-1]]
    return numbers.reshape(*lead, out_dim, half * 2).astype(dtype).swapaxes(-1, -2)


def _look_up(codes: UInt8[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """``table[codes]`` as a gather from 16 numbers that stay in a cache.

    Selects between constants are not: in the loop of the backward pass XLA computed 14 of them
    beforehand, as float32 arrays of the matrix' size (8.8 GB of an 8B model).
    """
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def by_input(values: UInt8[Array, "*lead O half_I"]) -> UInt[Array, "*lead I O"]:
    """Returns the codes of two a byte as uint4, one row for each input; jittable.

    >>> by_input(jnp.array([[0x12, 0x34]], jnp.uint8)).tolist()
    [[1], [2], [3], [4]]
    """

    def matrix(packed: Any) -> Any:
        codes = packed[..., None] >> jnp.array([4, 0], jnp.uint8) & 15
        return codes.reshape(packed.shape[0], -1).astype(jnp.uint4).T

    # One layer at a time: unpacked they are eight times as large.
    return matrix(values) if values.ndim == 2 else jax.lax.map(by_input, values)


def scales_by_input(
    scales: Float[Array, "*lead O blocks"] | DoubleQuantized,
) -> Float[Array, "*lead blocks O"]:
    """Returns the scale of each block, one row for each run of inputs."""
    if isinstance(scales, DoubleQuantized):
        shape, lead = scales.codes.shape, scales.codes.ndim - 2
        return block_scales(scales, lead).reshape(shape).swapaxes(-1, -2)
    return scales.swapaxes(-1, -2)


def dequantize_by_input(
    values: UInt[Array, "*lead I O"],
    scales: Float[Array, "*lead O blocks"] | DoubleQuantized,
    dtype: str,
    *,
    table: np.ndarray = CODEBOOK,
) -> Float[Array, "*lead I O"]:
    """Returns what `dequantize` does, of codes that are `by_input`."""
    absmax = scales_by_input(scales)
    numbers = _look_up(values.astype(jnp.uint8), table)
    numbers = numbers.reshape(*absmax.shape[:-1], -1, values.shape[-1]) * absmax[..., None, :]
    return numbers.reshape(values.shape).astype(dtype)


def block_scales(scales: DoubleQuantized, lead: int) -> Float[Array, "*lead blocks"]:
    """Returns the scales of all blocks; `lead` axes count layers."""
    codes = jnp.asarray(scales.codes)
    codes = codes.reshape(*codes.shape[:lead], -1)
    absmax = jnp.repeat(jnp.asarray(scales.absmax), NESTED_BLOCK, axis=-1)[..., : codes.shape[-1]]
    if scales.map is None:
        product = jnp.asarray(DYNAMIC_MAP)[codes] * absmax
    else:
        product = take_rows(jnp.asarray(scales.map), codes) * absmax
    # XLA may fuse multiply and add into one rounding, bitsandbytes rounds twice. A maximum that
    # changes no finite number keeps them apart.
    product = jnp.maximum(product, jnp.finfo(jnp.float32).min)
    return product + jnp.asarray(scales.offset)[..., None]
