"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig
from jaxlora.models.layers import LayerCache, Linear, Norm, remember
from jaxlora.ops.attention import Attend, Visibility
from jaxlora.ops.rope import Angles, rotate


class LatentAttention(nnx.Module):
    """Attention whose keys and values come out of one narrow vector per token.

    The cache holds keys and values as they are attended to, not that vector: a step of generation
    then widens one token, not all so far.
    """

    def __init__(self, cfg: ModelConfig):
        assert cfg.mla is not None
        self.cfg, self.mla = cfg, cfg.mla
        mla, embed, bias = cfg.mla, cfg.embed_dim, cfg.qkv_bias
        q_dim, v_dim = cfg.num_heads * cfg.head_dim, cfg.num_heads * mla.value_dim
        to_latent, from_latent = (axes.EMBED, axes.LATENT), (axes.LATENT, axes.HEADS)
        norms = dataclasses.replace(cfg, norm_eps=mla.norm_eps)
        if mla.q_rank is None:
            self.q_proj = Linear((embed, q_dim), (axes.EMBED, axes.HEADS), cfg)
        else:
            self.q_a_proj = Linear((embed, mla.q_rank), to_latent, cfg, bias=bias)
            self.q_a_norm = Norm((mla.q_rank,), norms, bias=False)
            self.q_b_proj = Linear((mla.q_rank, q_dim), from_latent, cfg)
        self.kv_a_proj = Linear((embed, mla.kv_rank + mla.rope_dim), to_latent, cfg, bias=bias)
        self.kv_a_norm = Norm((mla.kv_rank,), norms, bias=False)
        still_and_values = cfg.num_heads * (self._still_dim + mla.value_dim)
        self.kv_b_proj = Linear((mla.kv_rank, still_and_values), from_latent, cfg)
        self.o_proj = Linear((v_dim, embed), (axes.HEADS, axes.EMBED), cfg, bias=cfg.output_bias)

    @property
    def _still_dim(self) -> int:
        """Channels of queries and keys that are not turned."""
        return self.cfg.head_dim - self.mla.rope_dim

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Angles,
        visible: Visibility,
        attend: Attend,
        cache: LayerCache | None,
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        q = checkpoint_name(self._queries(x, angles), "query")
        k, v = self._keys_and_values(x, angles)
        k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
        k, v, cache = remember(k, v, cache, index)
        y = attend(q, k, v, visible, scale=self.cfg.attention_scale)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), cache

    def _queries(self, x, angles) -> Float[Array, "B T N H"]:
        if self.mla.q_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], self.cfg.num_heads, self.cfg.head_dim)
        still, turned = jnp.split(q, (self._still_dim,), axis=-1)
        return jnp.concatenate([still, self._turned(turned, angles)], axis=-1)

    def _keys_and_values(self, x, angles):
        """Keys ``[B, T, N, H]`` and values ``[B, T, N, W]``."""
        latent, turned = jnp.split(self.kv_a_proj(x), (self.mla.kv_rank,), axis=-1)
        wide = self.kv_b_proj(self.kv_a_norm(latent))
        wide = wide.reshape(*x.shape[:2], self.cfg.num_heads, -1)
        still, values = jnp.split(wide, (self._still_dim,), axis=-1)
        turned = self._turned(turned[:, :, None], angles)
        turned = jnp.broadcast_to(turned, (*still.shape[:-1], self.mla.rope_dim))
        return jnp.concatenate([still, turned], axis=-1), values

    def _turned(self, x, angles):
        return rotate(x, angles, interleaved=self.cfg.rope_interleaved)
