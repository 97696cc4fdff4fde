"""The codes and the largest magnitude of nf4's blocks: by numpy, and by XLA where there are many.

Both give bitsandbytes' bits. XLA's program reads a block once from memory and takes a third of the
time, but has to be compiled: 0.1 s, which numpy needs for 40 million numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from jaxlora.ops.chunks import equal_pieces, for_each_compiled, host_device, worth_compiling

BLOCK = 64


def hex_floats(literals: str) -> np.ndarray:
    """Returns float32 numbers from words like ``0x1.8p-1``.

    >>> hex_floats("0x1.8p-1 -0x1p0").tolist()
    [0.75, -1.0]
    """
    return np.array([float.fromhex(word) for word in literals.split()], np.float32)


# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
CODEBOOK = hex_floats("""
    -0x1p0 -0x1.647362p-1 -0x1.0cd66p-1 -0x1.94654p-2
    -0x1.23449ap-2 -0x1.7a6a7ep-3 -0x1.74f0e2p-4 0x0p0
    0x1.45f5fep-4 0x1.4995c6p-3 0x1.f809bap-3 0x1.5a0674p-2
    0x1.c3497p-2 0x1.200f56p-1 0x1.722766p-1 0x1p0
""")
# Codes change half-way between neighbours; a value on the boundary takes the lower code.
_BOUNDARIES = (CODEBOOK[:-1] + CODEBOOK[1:]) / np.float32(2)
# Magnitude that stands in for that of an all-zero block where it is divided by.
_SMALLEST_ABSMAX = np.float32(1e-38)

# Blocks that XLA's program is given at once: fewer, and the calls count; it is compiled for these.
_PIECE = 1 << 14
# XLA reads numbers below 1.2e-38 as zero. Between these magnitudes neither the reciprocal nor any
# number that could have another code than zero is as small.
_SAFE = np.float32(1e-36), np.float32(1e37)


def quantize_blocks(
    flat: Float[np.ndarray, " n"],
) -> tuple[UInt8[np.ndarray, " half_n"], Float[np.ndarray, " blocks"]]:
    """Returns packed codes and magnitudes of a run of blocks, the last of which may be short."""
    whole = flat.size // BLOCK * BLOCK
    blocks = flat[:whole].reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    inverse = np.float32(1) / np.maximum(absmax, _SMALLEST_ABSMAX)
    scaled = (blocks * inverse[:, None]).reshape(-1)
    if whole < flat.size:
        # bitsandbytes divides here where it multiplies above, and stores the clamped magnitude.
        last = np.maximum(np.abs(flat[whole:]).max(), _SMALLEST_ABSMAX)
        scaled = np.concatenate([scaled, flat[whole:] / last])
        absmax = np.append(absmax, last)
    codes = np.zeros(scaled.size, np.uint8)
    above = np.empty(scaled.size, bool)
    for boundary in _BOUNDARIES:
        np.greater(scaled, boundary, out=above)
        codes += above.view(np.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def are_many(matrix: np.ndarray) -> bool:
    """Returns whether `quantize_many` is for the blocks of a matrix."""
    whole = matrix.size % BLOCK == 0 and matrix.flags.c_contiguous
    return whole and worth_compiling(matrix)


def quantize_many(
    blocks: Float[np.ndarray, "blocks 64"],
    packed: UInt8[np.ndarray, "blocks 32"],
    absmax: Float[np.ndarray, " blocks"],
) -> None:
    """Fills `packed` and `absmax` on all cores."""

    def work(start: int, stop: int) -> None:
        # Not copied, if it begins where XLA wants an array to.
        piece = jax.device_put(blocks[start:stop], host_device(), may_alias=True)
        codes, largest = (np.asarray(part) for part in _program(piece))
        unsafe = np.flatnonzero(~((largest > _SAFE[0]) & (largest < _SAFE[1])))  # or NaN
        if unsafe.size:
            codes, largest = codes.copy(), largest.copy()
            again, largest[unsafe] = quantize_blocks(
                np.asarray(blocks[start:stop][unsafe], np.float32).reshape(-1)
            )
            codes[unsafe] = again.reshape(-1, BLOCK // 2)
        packed[start:stop], absmax[start:stop] = codes, largest

    starts = equal_pieces(len(blocks), _PIECE)
    for_each_compiled(work, [(start, start + _PIECE) for start in starts])


@jax.jit
def _program(
    blocks: Float[Array, "blocks 64"],
) -> tuple[UInt8[Array, "blocks 32"], Float[Array, " blocks"]]:
    """What `quantize_blocks` returns, of blocks whose magnitudes are within `_SAFE`."""
    numbers = blocks.astype(jnp.float32)
    # XLA's maximum on a CPU forgets NaN.
    absmax = jnp.where(jnp.isnan(numbers), jnp.inf, jnp.abs(numbers)).max(axis=1)
    codes = _codes(numbers * (1 / absmax)[:, None]).reshape(-1, BLOCK // 2, 2)
    return codes[..., 0] << 4 | codes[..., 1], absmax


def _codes(scaled: Float[Array, "blocks 64"]) -> UInt8[Array, "blocks 64"]:
    """Bisects the boundaries: 4 comparisons and 11 selects a number in place of 15 and 15 sums."""
    bits: list[Bool[Array, "blocks 64"]] = []
    for step in (8, 4, 2, 1):
        bits.append(scaled > _chosen(_BOUNDARIES[step - 1 :: 2 * step], bits))
    weighted = [bit.astype(jnp.uint8) << 3 - place for place, bit in enumerate(bits)]
    return functools.reduce(jnp.bitwise_or, weighted)


def _chosen(options: np.ndarray, bits: list[Any]) -> Any:
    """The one of 2**n numbers that n bits are the index of, the highest bit first."""
    if not bits:
        return options[0]
    half = len(options) // 2
    return jnp.where(bits[0], _chosen(options[half:], bits[1:]), _chosen(options[:half], bits[1:]))
