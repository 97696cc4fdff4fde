"""The transformer: embed, scan over stacked layers, norm, head."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig
from jaxlora.models.layers import Block, Linear, RMSNorm
from jaxlora.models.parameters import ParamSpec, declare
from jaxlora.ops.attention import attention_mask
from jaxlora.ops.matmul import embed, unembed
from jaxlora.ops.rope import rope_angles, rope_frequencies

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

# What the backward pass finds saved; the rest of a layer is computed again. From least memory to
# most speed.
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "attention"
    ),
    "matmuls": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "attention", "gate", "up"
    ),
    "none": None,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for generation.

    Every row writes at the same `index`; shorter prompts are padded on the left and their padding
    has segment 0, so nothing attends to it.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    index: Int[Array, ""]


def empty_cache(cfg: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """Returns a cache with room for `length` tokens in each of `batch` rows."""
    shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.int32(0))


class Transformer(nnx.Module):
    """A LLaMA-shaped transformer. Build it from a config, then `bind` it to a parameter tree.

    Args:
      cfg: shape and options.
      dtype: dtype of the activations.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      constrain: given an activation and its logical axes, pins its sharding.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        constrain: Constrain = lambda x, axes: x,
    ):
        self.cfg, self.dtype, self.remat, self.constrain = cfg, jnp.dtype(dtype), remat, constrain
        table = ParamSpec(
            (cfg.vocab_size, cfg.embed_dim),
            (axes.VOCAB, axes.EMBED),
            cfg.init_std,
            "model.embed_tokens.weight",
            kind="embedding",
        )
        self.embed = nnx.Dict(embedding=declare(table))
        self.layers = Block("model.layers.{layer}", cfg)
        self.norm = RMSNorm(cfg.embed_dim, "model.norm", cfg)
        head_axes = (axes.EMBED, axes.VOCAB)
        self.lm_head = (
            None
            if cfg.tie_embedding
            else Linear((cfg.embed_dim, cfg.vocab_size), head_axes, "lm_head", cfg, kind="head")
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns the last hidden states (after the final norm) and the cache with these tokens.

        Args:
          tokens: ids in ``[0, vocab_size)``.
          positions: position of each token in its own sequence.
          segments: sequence number of each token in its row, 0 for padding.
          cache: keys and values of earlier tokens; None attends within `tokens` only.
        """
        cfg = self.cfg
        x = embed(tokens, self.embed["embedding"].get_value()).astype(self.dtype)
        x = self.constrain(x, (axes.BATCH, axes.SEQUENCE, None))
        frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        angles = rope_angles(positions, frequencies)
        if cache is not None:
            cache = _note_tokens(cache, positions, segments)
        seen = (positions, segments) if cache is None else (cache.positions, cache.segments)
        mask = attention_mask(positions, seen[0], segments, seen[1], cfg.sliding_window)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x, inputs):
            weights, layer_cache = inputs
            block = nnx.merge(graphdef, weights)
            index = None if cache is None else cache.index
            x, layer_cache = block(x, angles, mask, layer_cache, index)
            return self.constrain(x, (axes.BATCH, axes.SEQUENCE, None)), layer_cache

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layer_caches = None if cache is None else (cache.keys, cache.values)
        x, layer_caches = jax.lax.scan(layer, x, (stacked, layer_caches))
        if cache is not None:
            assert layer_caches is not None
            keys, values = layer_caches
            index = cache.index + tokens.shape[1]
            cache = dataclasses.replace(cache, keys=keys, values=values, index=index)
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns float32 next-token logits."""
        if self.lm_head is None:
            return unembed(hidden, self.embed["embedding"].get_value())
        return self.lm_head(hidden, out_dtype=jnp.float32)


def _note_tokens(cache: Cache, positions, segments) -> Cache:
    write = jax.lax.dynamic_update_slice_in_dim
    return dataclasses.replace(
        cache,
        positions=write(cache.positions, positions, cache.index, axis=1),
        segments=write(cache.segments, segments, cache.index, axis=1),
    )


def bind(transformer: Transformer, params: Mapping[str, Any]) -> Transformer:
    """Returns `transformer` with the leaves of `params` in place of its descriptions.

    Cheap and pure, made to be called inside `jax.jit`; leaves may be plain, quantized or LoRA.

    >>> cfg = ModelConfig(vocab_size=8, embed_dim=4, mlp_dim=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=2, max_context=16, norm_eps=1e-5, rope_theta=1e4)
    >>> from jaxlora.models.parameters import init_params
    >>> model = bind(Transformer(cfg), init_params(cfg, jax.random.key(0), jnp.float32))
    >>> ids = jnp.arange(6).reshape(2, 3)
    >>> hidden, _ = model(ids, jnp.arange(3)[None].repeat(2, 0), jnp.ones_like(ids))
    >>> model.logits(hidden).shape
    (2, 3, 8)
    """

    def as_state(tree):
        return {
            key: as_state(leaf) if isinstance(leaf, Mapping) else nnx.Param(leaf)
            for key, leaf in tree.items()
        }

    return nnx.merge(nnx.graphdef(transformer), nnx.State(as_state(params)))
