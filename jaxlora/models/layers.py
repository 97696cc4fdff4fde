"""The parts of a transformer block as Flax NNX modules.

Flax is used for structure only: a module's parameters are born as `ParamSpec` descriptions, and
`jaxlora.models.transformer.bind` puts weight leaves in their place. No module knows what a leaf is.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec, declare
from jaxlora.ops.activations import ACTIVATIONS
from jaxlora.ops.attention import Attend, Visibility
from jaxlora.ops.matmul import matmul
from jaxlora.ops.rope import Angles, rotate

LayerCache = tuple[Float[Array, "B S K H"], Float[Array, "B S K W"]]


class Linear(nnx.Module):
    """``x @ kernel (+ bias)``."""

    def __init__(
        self,
        shape: tuple[int, int],
        logical_axes: tuple[str, str],
        cfg: ModelConfig,
        *,
        bias: bool = False,
        kind: str = "linear",
    ):
        transposed = kind == "head" or not cfg.conv1d
        self.kernel = declare(ParamSpec(shape, logical_axes, cfg.init_std, transposed, kind))
        spec = ParamSpec(shape[1:], logical_axes[1:], "zeros", kind="bias")
        self.bias = declare(spec) if bias else None

    def __call__(self, x: Float[Array, "*B I"], out_dtype=None) -> Float[Array, "*B O"]:
        y = matmul(x, self.kernel.get_value(), out_dtype=out_dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Norm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016).

    Statistics are taken over the last axis in float32; `shape` is the weight's.
    """

    def __init__(self, shape: tuple[int, ...], cfg: ModelConfig, *, bias: bool):
        self.cfg = cfg
        names = (axes.EMBED,) if shape == (cfg.embed_dim,) else (axes.HEAD_DIM,) * len(shape)
        init = "zeros" if cfg.norm_offset else "ones"
        self.scale = declare(ParamSpec(shape, names, init, kind="norm"))
        self.bias = declare(ParamSpec(shape, names, "zeros", kind="norm")) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        cfg, scale = self.cfg, self.scale.get_value()
        x32 = x.astype(jnp.float32)
        if cfg.norm == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + cfg.norm_eps)
        if cfg.norm == "rms" and not cfg.norm_offset:  # LLaMA rounds before it scales
            return normed.astype(x.dtype) * scale.astype(x.dtype)
        normed = normed * (scale.astype(jnp.float32) + cfg.norm_offset)
        if self.bias is not None:
            normed = normed + self.bias.get_value().astype(jnp.float32)
        return normed.astype(x.dtype)


def _qk_norm(heads: int, cfg: ModelConfig) -> Norm | None:
    if cfg.qk_norm is None:
        return None
    shapes = {
        "head": (cfg.head_dim,),
        "each_head": (heads, cfg.head_dim),
        "full": (heads * cfg.head_dim,),
    }
    return Norm(shapes[cfg.qk_norm], cfg, bias=cfg.qk_norm_bias)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional key-value cache."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        embed, bias = cfg.embed_dim, cfg.qkv_bias
        q_dim, kv_dim = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        to_heads, to_kv = (axes.EMBED, axes.HEADS), (axes.EMBED, axes.KV_HEADS)
        if cfg.qkv_layout == "separate":
            self.q_proj = Linear((embed, q_dim), to_heads, cfg, bias=bias)
            self.k_proj = Linear((embed, kv_dim), to_kv, cfg, bias=bias)
            self.v_proj = Linear((embed, kv_dim), to_kv, cfg, bias=bias)
        else:
            self.qkv_proj = Linear((embed, q_dim + 2 * kv_dim), to_heads, cfg, bias=bias)
        self.q_norm, self.k_norm = _qk_norm(cfg.num_heads, cfg), _qk_norm(cfg.num_kv_heads, cfg)
        self.o_proj = Linear((q_dim, embed), (axes.HEADS, axes.EMBED), cfg, bias=cfg.output_bias)
        sinks = ParamSpec((cfg.num_heads,), (axes.HEADS,), "zeros", kind="bias")
        self.sinks = declare(sinks) if cfg.attention_sinks else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Angles | None,
        visible: Visibility,
        attend: Attend,
        cache: LayerCache | None,
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        cfg = self.cfg
        q, k, v = self._project(x)
        if angles is not None:
            q, k = (rotate(y, angles, interleaved=cfg.rope_interleaved) for y in (q, k))
        q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
        v = checkpoint_name(v, "value")
        k, v, cache = remember(k, v, cache, index)
        y = attend(
            q,
            k,
            v,
            visible,
            scale=cfg.attention_scale,
            softcap=cfg.attention_softcap,
            sinks=None if self.sinks is None else self.sinks.get_value(),
        )
        return self.o_proj(y.reshape(*y.shape[:2], -1)), cache

    def _project(self, x):
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, normed, not yet turned."""
        cfg = self.cfg
        num_q, num_kv, batch = cfg.num_heads, cfg.num_kv_heads, x.shape[:2]
        if cfg.qkv_layout == "grouped":
            fused = self.qkv_proj(x).reshape(*batch, num_kv, -1, cfg.head_dim)
            q, k, v = fused[..., :-2, :], fused[..., -2, :], fused[..., -1, :]
        elif cfg.qkv_layout == "concatenated":
            q_dim, kv_dim = num_q * cfg.head_dim, num_kv * cfg.head_dim
            q, k, v = jnp.split(self.qkv_proj(x), (q_dim, q_dim + kv_dim), axis=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.reshape(*batch, num_q, cfg.head_dim)
        k, v = (y.reshape(*batch, num_kv, cfg.head_dim) for y in (k, v))
        return self._normed(q, self.q_norm), self._normed(k, self.k_norm), v

    def _normed(self, heads, norm):
        if norm is None:
            return heads
        if self.cfg.qk_norm != "full":
            return norm(heads)
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)


def remember(k, v, cache: LayerCache | None, index):
    """Returns all keys and values so far, in the dtype of the new ones, and the cache with them."""
    if cache is None:
        return k, v, None
    assert index is not None, "a cache comes with the place to write at"
    all_k, all_v = (
        jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)
        for old, new in zip(cache, (k, v), strict=True)
    )
    return all_k.astype(k.dtype), all_v.astype(v.dtype), (all_k, all_v)


class Mlp(nnx.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020), or ``down(act(up(x)))`` without a gate."""

    def __init__(self, cfg: ModelConfig, mlp_dim: int | None = None):
        self.cfg = cfg
        mlp_dim = mlp_dim or cfg.mlp_dim
        widen, narrow = (cfg.embed_dim, mlp_dim), (mlp_dim, cfg.embed_dim)
        to_mlp, from_mlp, bias = (axes.EMBED, axes.MLP), (axes.MLP, axes.EMBED), cfg.mlp_bias
        if cfg.mlp_fused:
            twice = (cfg.embed_dim, 2 * mlp_dim)
            self.gate_up_proj = Linear(twice, to_mlp, cfg, bias=bias)
        else:
            self.gate_proj = Linear(widen, to_mlp, cfg, bias=bias) if cfg.mlp_gated else None
            self.up_proj = Linear(widen, to_mlp, cfg, bias=bias)
        self.down_proj = Linear(narrow, from_mlp, cfg, bias=bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.cfg.activation]
        if self.cfg.mlp_fused:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate = None if self.gate_proj is None else self.gate_proj(x)
            up = self.up_proj(x)
        up = checkpoint_name(up, "up")
        if gate is None:
            return self.down_proj(act(up))
        return self.down_proj(act(checkpoint_name(gate, "gate")) * up)
