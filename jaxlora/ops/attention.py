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
) -> Bool[Array, "B T S"]:
    """Returns which keys a query may see: same segment, not later, nearer than `window` tokens.

    Segment 0 is padding; positions restart at 0 in every segment of a packed row.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & (query_segments[:, :, None] == key_segments[:, None, :])
    return visible if window is None else visible & (distance < window)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention, scores and softmax in float32; N query heads share K key-value heads."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(batch, length, num_heads, head_dim)
