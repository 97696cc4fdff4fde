"""Grouped-query attention over positions and segments (reference einsum implementation)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    window: int | None,
    *,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """Returns which keys a query may see: same segment, not later, nearer than `window` tokens.

    Segment 0 is padding; positions restart at 0 in every segment of a packed row. Not causal, a
    query sees both ways.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        visible &= distance >= 0
    return visible if window is None else visible & (jnp.abs(distance) < window)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N W"]:
    """Softmax attention, scores and softmax in float32; N query heads share K key-value heads.

    Args:
      scale: what scores are multiplied by; default ``H ** -0.5``.
      softcap: scores are bent into ``(-softcap, softcap)`` by a tanh (Gemma 2).
      sinks: one more score per head that takes weight and gives no value (gpt-oss).
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    y = jnp.einsum("BKGTS,BSKW->BTKGW", weights.astype(v.dtype), v)
    return y.reshape(batch, length, num_heads, v.shape[-1])
