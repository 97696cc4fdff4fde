"""The transformer: embed, scan over stacks of layers, norm, head."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlora.core import axes
from jaxlora.models.block import Block
from jaxlora.models.config import ModelConfig
from jaxlora.models.head import HeadTransform, classifier_head, language_head, pool
from jaxlora.models.layers import Linear, Norm
from jaxlora.models.moe import Spread, in_place
from jaxlora.models.parameters import ParamSpec, declare
from jaxlora.models.stacks import Apart, AttentionInputs, Stack, each_layer, make_stacks
from jaxlora.ops.attention import Attend, reference_attention
from jaxlora.ops.matmul import embed, unembed

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

# What the backward pass finds saved; the rest of a layer is computed again. From least memory to
# most speed. `offload` is `full` whose layer inputs wait in the host's memory.
REMAT_POLICIES: dict[str, Any] = {
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "attention", "middle"
    ),
    "matmuls": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "attention", "middle", "gate", "up"
    ),
    "none": None,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for generation.

    Every row writes at the same `index`; shorter prompts are padded on the left and their padding
    has segment 0, so nothing attends to it.

    Attributes:
      layers: keys ``[L, B, S, K, H]`` and values ``[L, B, S, K, W]`` of every stack, or `Apart`.
    """

    layers: dict[str, Any]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    index: Int[Array, ""]


def empty_cache(
    cfg: ModelConfig, batch: int, length: int, dtype: DTypeLike, *, apart: bool = False
) -> Cache:
    """Returns a cache with room for `length` tokens in each of `batch` rows.

    `apart` is for parameters that are `Apart`: layers are then written where they are.
    """

    def zeros(layers: int, channels: int) -> Any:
        shape = (batch, length, cfg.num_kv_heads, channels)
        if apart:
            return Apart(tuple(jnp.zeros(shape, dtype) for _ in range(layers)))
        return jnp.zeros((layers, *shape), dtype)

    layers = {
        name: (zeros(len(numbers), cfg.head_dim), zeros(len(numbers), cfg.value_dim))
        for stack in make_stacks(cfg)
        for name, numbers in zip(stack.names, stack.layers, strict=True)
    }
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(layers, slots, slots, jnp.int32(0))


class Transformer(nnx.Module):
    """A transformer. Build it from a config, then `bind` it to a parameter tree.

    Args:
      cfg: shape and options.
      dtype: dtype of the activations.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      constrain: given an activation and its logical axes, pins its sharding.
      attend: attention within the tokens given; with a cache it is the reference's.
      spread: how tokens and experts of a mixture are brought together.
      context: into how many parts the tokens of a row are split; the loss is cut alike.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        constrain: Constrain = lambda x, axes: x,
        attend: Attend = reference_attention,
        spread: Spread = in_place,
        context: int = 1,
    ):
        self.cfg, self.dtype, self.remat, self.constrain = cfg, jnp.dtype(dtype), remat, constrain
        self.attend, self.spread, self.context = attend, spread, context
        self.embed = _table(cfg.vocab_size, axes.VOCAB, cfg)
        self.embed_positions = (
            _table(cfg.learned_positions, axes.POSITIONS, cfg) if cfg.learned_positions else None
        )
        self.embed_types = (
            _table(cfg.token_types, axes.TOKEN_TYPES, cfg) if cfg.token_types else None
        )
        self.embed_norm = _norm(cfg) if cfg.embed_norm else None
        for stack in make_stacks(cfg):
            for name, shape in zip(stack.names, stack.shapes, strict=True):
                setattr(self, name, Block(cfg, shape, spread))
        self.norm = _norm(cfg) if cfg.final_norm else None
        self.head_transform = HeadTransform(cfg) if cfg.head_activation else None
        self.lm_head, self.classifier = language_head(cfg), classifier_head(cfg)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: Cache | None = None,
        types: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns the last hidden states (after the final norm) and the cache with these tokens.

        Args:
          tokens: ids in ``[0, vocab_size)``.
          positions: position of each token in its own sequence.
          segments: sequence number of each token in its row, 0 for padding.
          cache: keys and values of earlier tokens; None attends within `tokens` only.
          types: token types (BERT: 0 in the first text, 1 in the second); None for all 0.
        """
        x = self._embedded(tokens, positions, types)
        if cache is not None:
            cache = _note_tokens(cache, positions, segments)
        cached = None if cache is None else (cache.positions, cache.segments)
        inputs = AttentionInputs(self.cfg, positions, segments, cached)
        caches: dict[str, Any] = {}
        for stack in make_stacks(self.cfg):
            x, stack_caches = self._run(stack, x, inputs, cache)
            caches |= stack_caches
        if cache is not None:
            index = cache.index + tokens.shape[1]
            cache = dataclasses.replace(cache, layers=caches, index=index)
        return x if self.norm is None else self.norm(x), cache

    def _embedded(self, tokens, positions, types) -> Float[Array, "B T D"]:
        x = embed(tokens, self.embed["embedding"].get_value()).astype(self.dtype)
        if self.cfg.embed_scale != 1.0:
            x = x * jnp.asarray(self.cfg.embed_scale, self.dtype)
        if self.embed_positions is not None:
            table = self.embed_positions["embedding"].get_value()
            x = x + embed(positions + self.cfg.position_offset, table).astype(self.dtype)
        if self.embed_types is not None:
            table = self.embed_types["embedding"].get_value()
            types = jnp.zeros_like(tokens) if types is None else types
            x = x + embed(types, table).astype(self.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return self.constrain(x, (axes.BATCH, axes.SEQUENCE, None))

    def _run(self, stack: Stack, x, inputs: AttentionInputs, cache: Cache | None):
        """Scans over a stack: `x` after its layers, and ``{name: cache}`` of each of them."""
        index, attend = (None, self.attend) if cache is None else (cache.index, reference_attention)
        split = [nnx.split(getattr(self, name)) for name in stack.names]

        def layer(number, x, weights, kind, layer_cache):
            x = checkpoint_name(x, "layer_input")
            block = nnx.merge(split[number][0], weights)
            visible, angles = inputs.of(kind)
            x, layer_cache = block(x, angles, visible, attend, layer_cache, index)
            return self.constrain(x, (axes.BATCH, axes.SEQUENCE, None)), layer_cache

        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False, static_argnums=0)

        def period(x, scanned):
            layer_caches = []
            for number, (weights, kind, layer_cache) in enumerate(scanned):
                x, layer_cache = layer(number, x, weights, kind, layer_cache)
                layer_caches.append(layer_cache)
            return x, layer_caches

        scanned = [
            (weights, inputs.numbers(numbers), None if cache is None else cache.layers[name])
            for name, numbers, (_, weights) in zip(stack.names, stack.layers, split, strict=True)
        ]
        x, layer_caches = each_layer(period, x, scanned, len(stack.layers[0]))
        return x, dict(zip(stack.names, layer_caches, strict=True))

    def pooled(
        self, hidden: Float[Array, "B T D"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B *T D"]:
        """Returns what the head reads: a classifier one vector for each row, others all."""
        return pool(hidden, segments, self.cfg.pooling) if self.cfg.num_labels else hidden

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns float32 logits: of the next token, of the token itself in an encoder, of the
        labels (from `pooled`) in a classifier."""
        if self.head_transform is not None:
            hidden = self.head_transform(hidden)
        if self.classifier is not None:
            return self.classifier(hidden, out_dtype=jnp.float32)
        if isinstance(self.lm_head, Linear):
            y = self.lm_head(hidden, out_dtype=jnp.float32)
        else:
            y = unembed(hidden, self.embed["embedding"].get_value())
            if self.lm_head is not None:
                y = y + self.lm_head["bias"].get_value().astype(y.dtype)
        y = y * self.cfg.logit_scale
        cap = self.cfg.logit_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)


def _norm(cfg: ModelConfig) -> Norm:
    return Norm((cfg.embed_dim,), cfg, bias=cfg.norm_bias)


def _table(rows: int, row_axis: str, cfg: ModelConfig) -> nnx.Dict:
    spec = ParamSpec((rows, cfg.embed_dim), (row_axis, axes.EMBED), cfg.init_std, kind="embedding")
    return nnx.Dict(embedding=declare(spec))


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
