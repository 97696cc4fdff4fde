"""Rows of several segments, and what attention makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.ops.attention import Visibility

# Two rows: three segments that end in padding, one that fills the row.
LENGTHS = ((9, 1, 14), (29,))
T = 29


def visible(windows=(None,), kind=0, causal=True, in_place=True, lengths=LENGTHS):
    segments, positions = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row, of_row in enumerate(lengths):
        start = 0
        for number, length in enumerate(of_row, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    arrays = [jnp.asarray(x) for x in (positions, positions, segments, segments)]
    return Visibility(*arrays, jnp.int32(kind), windows, causal, in_place)


def inputs(heads=4, kv_heads=2, key_dim=8, value_dim=8):
    shapes = (heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim), (heads, value_dim)
    keys = jax.random.split(jax.random.key(1), 4)
    return [jax.random.normal(key, (2, T, *shape)) for key, shape in zip(keys, shapes, strict=True)]


def value_and_gradients(attend, seen, arrays, sinks=None, **options):
    *qkv, dy = arrays
    # What nobody reads is nobody's: kernels may write anything there.
    dy = dy * (seen.query_segments > 0)[..., None, None]

    @jax.jit
    def both(seen, dy, *operands):
        y, back = jax.vjp(
            lambda q, k, v, sinks: attend(q, k, v, seen, sinks=sinks, **options), *operands
        )
        return y, back(dy)

    y, gradients = both(seen, dy, *qkv, sinks)
    real = np.asarray(seen.query_segments > 0)
    return [np.asarray(y)[real], *(x for x in gradients if x is not None)]
