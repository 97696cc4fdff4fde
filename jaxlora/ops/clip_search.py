"""int4's search for the clip of each group: by numpy, and by XLA where there are many groups.

Both give the same bits. XLA's program takes about half the time, but has to be compiled: 0.35 s,
which numpy needs for 45 million numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlora.ops.chunks import equal_pieces, for_each_compiled, host_device, worth_compiling

# Fractions of a group's largest magnitude tried as its range. On normal data 8 of them come within
# 0.5 % of the error that 24 reach; below 0.65 nothing wins but in groups with one far outlier.
_CLIPS = np.linspace(0.65, 1.0, 8, dtype=np.float32)
# Groups smaller than this everywhere become zero: -8 / peak would leave the range of float32.
_SMALLEST_PEAK = np.float32(1e-37)

# What XLA's program is given at once, and compiled for: inputs and outputs.
_ROWS, _COLUMNS = 1024, 512
# XLA reads numbers below 1.2e-38 as zero. Between these peaks that changes no code.
_SAFE = np.float32(1e-30), np.float32(1e37)


def search(
    x: Float[np.ndarray, "group *columns"],
) -> tuple[Int[np.ndarray, "group *columns"], Float[np.ndarray, "*columns"]]:
    """Returns codes and scales with the clip of least squared error; overwrites float32 `x`."""
    top, bottom = x.max(axis=0), x.min(axis=0)
    peak = np.where(top > -bottom, top, bottom)
    usable = np.abs(peak) > _SMALLEST_PEAK
    x *= np.divide(np.float32(-8), peak, out=np.zeros_like(peak), where=usable)
    least, best = np.full_like(peak, np.inf), np.ones_like(peak)
    steps, codes = np.empty_like(x), np.empty_like(x)
    for clip in _CLIPS:
        _round(np.divide(x, clip, out=steps), out=codes)
        steps -= codes
        steps *= steps
        error = steps.sum(axis=0) * clip**2
        better = error < least
        least[better], best[better] = error[better], clip
    # Not `where(usable, ...)`: a peak of NaN or infinity must reach the caller's check.
    scale = (peak * best / np.float32(-8)).astype(jnp.bfloat16)
    scale[np.abs(peak) <= _SMALLEST_PEAK] = 0
    # The codes are for the scale as it is stored.
    np.divide(scale.astype(np.float32) * np.float32(-8), peak, out=best, where=usable)
    codes = _round(np.divide(x, best, out=steps), out=codes).astype(np.int8)
    return codes, scale


def _round(steps: np.ndarray, *, out: np.ndarray) -> np.ndarray:
    np.rint(steps, out=out)
    return np.clip(out, -8, 7, out=out)


def are_many(weight: np.ndarray, group: int) -> bool:
    """Returns whether `search_many` is for the groups of a matrix ``[in, out]``."""
    in_dim, out_dim = weight.shape
    a_piece = _ROWS % group == 0 and in_dim >= _ROWS and out_dim >= _COLUMNS
    return a_piece and worth_compiling(weight)


def search_many(
    weight: Float[np.ndarray, "I O"],
    values: Int[np.ndarray, "I O"],
    scales: Float[np.ndarray, "groups O"],
) -> None:
    """Fills `values` and `scales` on all cores."""
    (in_dim, out_dim), group = weight.shape, len(weight) // len(scales)
    down, across = equal_pieces(in_dim, _ROWS), equal_pieces(out_dim, _COLUMNS)
    corners = [(row, column) for row in down for column in across]

    def work(start: int, stop: int) -> None:
        for row, column in corners[start:stop]:
            box = slice(row, row + _ROWS), slice(column, column + _COLUMNS)
            groups = slice(row // group, (row + _ROWS) // group), box[1]
            values[box], scales[groups] = _searched(weight[box], group)

    for_each_compiled(work, [(number, number + 1) for number in range(len(corners))])


def _searched(piece: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    turned = jax.device_put(piece, host_device())  # four times as fast as numpy
    codes, scale, safe = _program(turned.reshape(-1, group, _COLUMNS), _CLIPS)
    if not safe:
        columns = piece.reshape(-1, group, _COLUMNS).swapaxes(0, 1)
        found, slow = search(np.array(columns, np.float32, order="C"))
        return found.swapaxes(0, 1).reshape(piece.shape), slow
    return np.asarray(codes).reshape(piece.shape), np.asarray(scale)


@jax.jit
def _program(
    x: Float[Array, "groups group columns"], clips: Float[Array, " clips"]
) -> tuple[Int[Array, "groups group columns"], Float[Array, "groups columns"], Array]:
    """What `search` returns, and whether all peaks are within `_SAFE`, where it does.

    Loops over a group keep numpy's order of summation, and run over its neighbours' numbers. Its
    divisors are no broadcasts, by whose reciprocals XLA would multiply.
    """
    # XLA's maximum on a CPU may forget NaN.
    x = jnp.where(jnp.isnan(x), jnp.inf, x.astype(jnp.float32))
    group = x.shape[1]

    def row(number: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, number, 1, keepdims=False)

    none = jnp.zeros_like(x[:, 0])
    top, bottom = jax.lax.fori_loop(
        0,
        group,
        lambda k, ends: (jnp.maximum(ends[0], row(k)), jnp.minimum(ends[1], row(k))),
        (none - jnp.inf, none + jnp.inf),
    )
    peak = jnp.where(top > -bottom, top, bottom)
    size = jnp.abs(peak)
    safe = (size > _SAFE[0]) & (size < _SAFE[1])
    factor = jnp.where(safe, -8 / peak, 0)

    def attempt(found: tuple[Array, Array], clip: Array) -> tuple[tuple[Array, Array], None]:
        clips = jnp.where(safe, clip, 1)

        def add(k: Array, error: Array) -> Array:
            steps = row(k) * factor / clips
            rest = steps - jnp.clip(jnp.round(steps), -8, 7)
            # A maximum that changes nothing: else multiply and add become one rounding.
            return error + jnp.maximum(rest * rest, 0)

        error = jax.lax.fori_loop(0, group, add, none) * (clip * clip)
        least, best = found
        return (jnp.minimum(error, least), jnp.where(error < least, clip, best)), None

    (_, best), _ = jax.lax.scan(attempt, (none + jnp.inf, none + 1), clips)
    scale = (peak * best / -8).astype(jnp.bfloat16)
    stored = jnp.where(safe, scale.astype(jnp.float32) * -8 / peak, 1)

    def put(k: Array, codes: Array) -> Array:
        steps = jnp.clip(jnp.round(row(k) * factor / stored), -8, 7)
        return jax.lax.dynamic_update_index_in_dim(codes, steps.astype(jnp.int8), k, 1)

    codes = jax.lax.fori_loop(0, group, put, jnp.zeros(x.shape, jnp.int8))
    return codes, scale, safe.all()
