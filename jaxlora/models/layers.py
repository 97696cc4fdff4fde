"""The parts of a transformer block as Flax NNX modules.

Flax is used for structure only: a module's parameters are born as `ParamSpec` descriptions, and
`jaxlora.models.transformer.bind` puts weight leaves in their place. No module knows what a leaf is.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec, declare
from jaxlora.ops.attention import attention
from jaxlora.ops.matmul import matmul
from jaxlora.ops.rope import rotate

LayerCache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]


class Linear(nnx.Module):
    """``x @ kernel (+ bias)``; `name` is the Hugging Face module path."""

    def __init__(
        self,
        shape: tuple[int, int],
        logical_axes: tuple[str, str],
        name: str,
        cfg: ModelConfig,
        *,
        bias: bool = False,
        kind: str = "linear",
    ):
        self.kernel = declare(
            ParamSpec(shape, logical_axes, cfg.init_std, f"{name}.weight", True, kind)
        )
        spec = ParamSpec(shape[1:], logical_axes[1:], "zeros", f"{name}.bias", kind="bias")
        self.bias = declare(spec) if bias else None

    def __call__(self, x: Float[Array, "*B I"], out_dtype=None) -> Float[Array, "*B O"]:
        y = matmul(x, self.kernel.get_value(), out_dtype=out_dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, statistics in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, name: str, cfg: ModelConfig):
        self.eps = cfg.norm_eps
        self.scale = declare(
            ParamSpec((dim,), (axes.EMBED,), "ones", f"{name}.weight", kind="norm")
        )

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale.get_value().astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional key-value cache."""

    def __init__(self, name: str, cfg: ModelConfig):
        self.cfg = cfg
        embed, bias = cfg.embed_dim, cfg.attention_bias
        q_dim, kv_dim = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        to_heads, to_kv = (axes.EMBED, axes.HEADS), (axes.EMBED, axes.KV_HEADS)
        self.q_proj = Linear((embed, q_dim), to_heads, f"{name}.q_proj", cfg, bias=bias)
        self.k_proj = Linear((embed, kv_dim), to_kv, f"{name}.k_proj", cfg, bias=bias)
        self.v_proj = Linear((embed, kv_dim), to_kv, f"{name}.v_proj", cfg, bias=bias)
        self.o_proj = Linear(
            (q_dim, embed), (axes.HEADS, axes.EMBED), f"{name}.o_proj", cfg, bias=bias
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]],
        mask: Bool[Array, "B T S"],
        cache: LayerCache | None,
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.cfg.head_dim)

        q = checkpoint_name(rotate(heads(self.q_proj(x)), angles), "query")
        k = checkpoint_name(rotate(heads(self.k_proj(x)), angles), "key")
        v = checkpoint_name(heads(self.v_proj(x)), "value")
        if cache is not None:
            assert index is not None, "a cache comes with the place to write at"
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
        y = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask)
        y = checkpoint_name(y.reshape(*y.shape[:2], -1), "attention")
        return self.o_proj(y), cache


class GatedMlp(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU, Shazeer 2020)."""

    def __init__(self, name: str, cfg: ModelConfig):
        widen, narrow = (cfg.embed_dim, cfg.mlp_dim), (cfg.mlp_dim, cfg.embed_dim)
        to_mlp, from_mlp, bias = (axes.EMBED, axes.MLP), (axes.MLP, axes.EMBED), cfg.mlp_bias
        self.gate_proj = Linear(widen, to_mlp, f"{name}.gate_proj", cfg, bias=bias)
        self.up_proj = Linear(widen, to_mlp, f"{name}.up_proj", cfg, bias=bias)
        self.down_proj = Linear(narrow, from_mlp, f"{name}.down_proj", cfg, bias=bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = checkpoint_name(self.gate_proj(x), "gate")
        up = checkpoint_name(self.up_proj(x), "up")
        return self.down_proj(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One transformer layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, name: str, cfg: ModelConfig):
        self.input_norm = RMSNorm(cfg.embed_dim, f"{name}.input_layernorm", cfg)
        self.attention = Attention(f"{name}.self_attn", cfg)
        self.post_attention_norm = RMSNorm(cfg.embed_dim, f"{name}.post_attention_layernorm", cfg)
        self.mlp = GatedMlp(f"{name}.mlp", cfg)

    def __call__(self, x, angles, mask, cache, index):
        y, cache = self.attention(self.input_norm(x), angles, mask, cache, index)
        x = x + y
        return x + self.mlp(self.post_attention_norm(x)), cache
