"""Attention over chunks of queries: the scores of a row never exist whole, in either pass."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlora.ops.attention import Visibility, masked_attention

# More are no leaner: the scores that a causal query never sees are an eighth of all then.
_MOST_GROUPS = 4


def chunked_attention(
    q, k, v, visible: Visibility, *, scale=None, softcap=None, sinks=None, chunk: int = 64
):
    """`Attend` that recomputes the scores of a chunk in the backward pass.

    The numbers are those of `reference_attention` but for the order of float32 sums.

    Args:
      chunk: queries at a time, >= 1; scores take ``B * N * chunk * S * 4`` bytes.
    """
    length, dtype = q.shape[1], k.dtype
    chunk = min(chunk, length)
    # The gradients of keys and values are sums over chunks, so they are summed in float32.
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    y = []
    for start, stop in _groups(length, chunk):
        first, last = _keys(visible, start, stop, k.shape[1])
        near = (k[:, first:last], v[:, first:last])
        seen = (visible.key_positions[:, first:last], visible.key_segments[:, first:last])

        @jax.checkpoint
        def attend(queries, near=near, seen=seen):
            q_chunk, positions, segments = queries
            part = dataclasses.replace(
                visible,
                query_positions=positions,
                query_segments=segments,
                key_positions=seen[0],
                key_segments=seen[1],
            )
            keys, values = (each.astype(dtype) for each in near)
            return masked_attention(
                q_chunk, keys, values, part.mask(), scale=scale, softcap=softcap, sinks=sinks
            )

        group = (
            _cut(each[:, start:stop], chunk, fill)
            # A query that fills the last chunk up is in a segment of its own, and sees nothing.
            for each, fill in ((q, 0), (visible.query_positions, 0), (visible.query_segments, -1))
        )
        out = jnp.moveaxis(jax.lax.map(attend, tuple(group)), 0, 1)
        y.append(out.reshape(out.shape[0], -1, *out.shape[3:])[:, : stop - start])
    return checkpoint_name(jnp.concatenate(y, axis=1), "attention")


def _groups(length: int, chunk: int) -> list[tuple[int, int]]:
    """Runs of whole chunks: each is a loop of its own over the keys that its last query sees."""
    chunks = -(-length // chunk)
    per_group = -(-chunks // min(_MOST_GROUPS, chunks)) * chunk
    return [(start, min(start + per_group, length)) for start in range(0, length, per_group)]


def _keys(visible: Visibility, start: int, stop: int, length: int) -> tuple[int, int]:
    """The keys that queries `start` to `stop` can see at all, by their places in the row."""
    if not visible.in_place:
        return 0, length
    windows = [length if window is None else window for window in visible.windows]
    first = max(0, start - max(windows) + 1)
    last = stop if visible.causal else min(length, stop + max(windows) - 1)
    return first, last


def _cut(x, chunk: int, fill):
    """``[B, T, ...] -> [chunks, B, chunk, ...]``, filled up at the end."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
