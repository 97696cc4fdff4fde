"""Attention over chunks of queries: the scores of a row never exist whole, in either pass.

The gradient is written out (Dao et al. 2022): beside its operands it needs the result and each
query's log-sum of exponentials, from which a chunk's scores are made again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora.ops.attention import Visibility

# More are hardly faster: the scores that a causal query never sees are an eighth of all then.
_MOST_GROUPS = 4
# Products of fewer rows are slow.
_LEAST_GROUP = 64
_ALIGNED = 16
_HIDDEN = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class _Form:
    scale: float
    softcap: float | None
    chunk: int


class _Queries(NamedTuple):
    q: Float[Array, "B K G T H"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]


def chunked_attention(
    q, k, v, visible: Visibility, *, scale=None, softcap=None, sinks=None, chunk: int = 128
):
    """`Attend` that makes the scores of a chunk again in the backward pass.

    The numbers are those of `reference_attention` but for the order of float32 sums.

    Args:
      chunk: most queries at a time, >= 1; scores take ``B * N * chunk * S * 4`` bytes.
    """
    batch, length, num_heads, head_dim = q.shape
    form = _Form(head_dim**-0.5 if scale is None else scale, softcap, chunk)
    q = q.reshape(batch, length, k.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (each.transpose(0, 2, 1, 3) for each in (k, v))
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(k.shape[1], -1)
    y: Any = _attend(form, q, k, v, visible, sinks)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, v.shape[-1])


class _Group(NamedTuple):
    """Queries `start` to `stop`, and the keys `first` to `last` that any of them can see."""

    start: int
    stop: int
    first: int
    last: int


def _groups(visible: Visibility, length: int, keys: int, chunk: int) -> list[_Group]:
    seen_by_place = visible.in_place and (visible.causal or None not in visible.windows)
    size = -(-length // _MOST_GROUPS) if seen_by_place else length
    size = max(size, min(_LEAST_GROUP, chunk))
    whole = chunk if size > chunk else min(_ALIGNED, chunk)
    size = -(-size // whole) * whole
    starts = range(0, length, size)
    stops = (min(start + size, length) for start in starts)
    return [
        _Group(start, stop, *_keys(visible, start, stop, keys))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _keys(visible: Visibility, start: int, stop: int, length: int) -> tuple[int, int]:
    """The keys that queries `start` to `stop` can see at all, by their places in the row."""
    if not visible.in_place:
        return 0, length
    windows = [length if window is None else window for window in visible.windows]
    first = max(0, start - max(windows) + 1)
    last = stop if visible.causal else min(length, stop + max(windows) - 1)
    return first, last


def _cut_out(group: _Group, q, k, v, visible: Visibility):
    queries, keys = slice(group.start, group.stop), slice(group.first, group.last)
    near = dataclasses.replace(
        visible,
        key_positions=visible.key_positions[:, keys],
        key_segments=visible.key_segments[:, keys],
    )
    of_group = _Queries(
        q[:, :, :, queries],
        visible.query_positions[:, queries],
        visible.query_segments[:, queries],
    )
    return of_group, k[:, :, keys], v[:, :, keys], near


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, q, k, v, visible: Visibility, sinks):
    """``[B, K, G, T, W]`` of queries ``[B, K, G, T, H]``, keys and values ``[B, K, S, H or W]``."""
    return _forward(form, q, k, v, visible, sinks)[0]


def _forward(form, q, k, v, visible, sinks):
    y, log_total = [], []
    for group in _groups(visible, q.shape[3], k.shape[2], form.chunk):
        queries, keys, values, seen = _cut_out(group, q, k, v, visible)
        of_chunk = functools.partial(_of_chunk, form, keys, values, seen, sinks)
        _, made = _over_chunks(of_chunk, _chunks(queries, form.chunk))
        for all_groups, each in zip((y, log_total), made, strict=True):
            all_groups.append(_joined(each, group.stop - group.start))
    y, log_total = (
        checkpoint_name(jnp.concatenate(each, axis=3), "attention") for each in (y, log_total)
    )
    return y, (q, k, v, visible, sinks, y, log_total)


def _backward(form, kept, dy):
    q, k, v, visible, sinks, y, log_total = kept
    dk, dv = (jnp.zeros(each.shape, jnp.float32) for each in (k, v))
    dq, dsinks = [], None if sinks is None else jnp.zeros_like(sinks)
    for group in _groups(visible, q.shape[3], k.shape[2], form.chunk):
        queries, keys, values, seen = _cut_out(group, q, k, v, visible)
        of_chunk = functools.partial(_gradient_of_chunk, form, keys, values, seen, sinks)
        rest = (each[:, :, :, group.start : group.stop] for each in (y, log_total, dy))
        chunks = tuple(_chunks(each, form.chunk) for each in (queries, *rest))
        shares, made = _over_chunks(of_chunk, chunks)
        dq.append(_joined(made, group.stop - group.start))
        near = (slice(None), slice(None), slice(group.first, group.last))
        dk, dv = dk.at[near].add(shares[0]), dv.at[near].add(shares[1])
        dsinks = jax.tree.map(jnp.add, dsinks, shares[2])
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None, dsinks


_attend.defvjp(_forward, _backward)


def _of_chunk(form, k, v, visible, sinks, queries: _Queries):
    """No sums, and the result with the logarithm of each query's sum of exponentials."""
    scores = _scores(form, queries, k, visible)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[:, :, None, None])
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks[:, :, None, None] - top)
    y = _product("BKGTS,BKSW->BKGTW", weights.astype(v.dtype), v) / total
    return None, (y.astype(v.dtype), (top + jnp.log(total))[..., 0])


def _gradient_of_chunk(form, k, v, visible, sinks, inputs):
    """Its shares of the gradients of keys, values and sinks, and the gradient of its queries."""
    queries, y, log_total, dy = inputs
    scores = _scores(form, queries, k, visible)
    weights = jnp.exp(scores - log_total[..., None])
    dweights = _product("BKGTW,BKSW->BKGTS", dy, v)
    # The mean gradient of a query's weights is that of its result, if that was not rounded.
    of_result = (dy, y) if y.dtype == jnp.float32 else (weights, dweights)
    mean = jnp.sum(of_result[0] * of_result[1], axis=-1)
    dscores = weights * (dweights - mean[..., None])
    if form.softcap is not None:
        hidden_too = jnp.maximum(scores, -form.softcap)
        dscores = dscores * (1 - jnp.square(hidden_too / form.softcap))
    dscores = (dscores * form.scale).astype(k.dtype)
    shares = (
        _product("BKGTS,BKGTH->BKSH", dscores, queries.q),
        _product("BKGTS,BKGTW->BKSW", weights.astype(v.dtype), dy),
        None if sinks is None else _of_sinks(sinks, log_total, mean),
    )
    return shares, _product("BKGTS,BKSH->BKGTH", dscores, k).astype(queries.q.dtype)


def _scores(form: _Form, queries: _Queries, k, visible: Visibility) -> Float[Array, "B K G T S"]:
    seen = dataclasses.replace(
        visible, query_positions=queries.positions, query_segments=queries.segments
    )
    scores = _product("BKGTH,BKSH->BKGTS", queries.q, k) * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    return jnp.where(seen.mask()[:, None, None], scores, _HIDDEN)


def _of_sinks(sinks, log_total, mean) -> Float[Array, "K G"]:
    weight = jnp.exp(sinks[:, :, None] - log_total)
    return -jnp.sum(weight * mean, axis=(0, 3))


def _product(formula: str, x, y) -> Float[Array, "..."]:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _over_chunks(of_chunk: Callable[[Any], tuple[Any, Any]], chunks: Any) -> tuple[Any, Any]:
    """The sum of the first that `of_chunk` returns, and the second of every chunk."""
    first = jax.tree.map(lambda x: x[0], chunks)
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        shares, made = of_chunk(first)
        return shares, jax.tree.map(lambda x: x[None], made)

    def add(sums, part):
        shares, made = of_chunk(part)
        return jax.tree.map(jnp.add, sums, shares), made

    like = jax.eval_shape(of_chunk, first)[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(add, zeros, chunks)


def _chunks(tree: Any, chunk: int) -> Any:
    """Leaves ``[B, (K, G,) T, ...] -> [chunks, B, (K, G,) chunk, ...]``, filled up at the end.

    Segments are filled with -1, so that a query that fills a chunk up sees nothing.
    """

    def cut(x, fill=0):
        axis = 1 if x.ndim == 2 else 3
        size = min(chunk, x.shape[axis])
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, -x.shape[axis] % size)
        x = jnp.pad(x, padding, constant_values=fill)
        x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    if isinstance(tree, _Queries):
        return _Queries(cut(tree.q), cut(tree.positions), cut(tree.segments, -1))
    return cut(tree)


def _joined(x: Float[Array, "chunks B K G chunk ..."], length: int) -> Array:
    """What `_chunks` cut, whole again."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :length]
