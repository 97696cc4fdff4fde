"""What stands between the last hidden states and the logits."""

from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig
from jaxlora.models.layers import Linear, Norm
from jaxlora.models.parameters import ParamSpec, declare
from jaxlora.ops.activations import ACTIVATIONS


class HeadTransform(nnx.Module):
    """One more dense layer, with an activation and perhaps a norm (BERT, Devlin et al. 2018)."""

    def __init__(self, cfg: ModelConfig):
        assert cfg.head_activation is not None
        self.activation = cfg.head_activation
        square = (cfg.embed_dim, cfg.embed_dim)
        self.dense = Linear(square, (axes.EMBED, axes.EMBED_OUT), cfg, bias=cfg.head_dense_bias)
        self.norm = Norm((cfg.embed_dim,), cfg, bias=cfg.norm_bias) if cfg.head_norm else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = ACTIVATIONS[self.activation](self.dense(x))
        return y if self.norm is None else self.norm(y)


def pool(
    hidden: Float[Array, "B T D"], segments: Int[Array, "B T"], pooling: str
) -> Float[Array, "B D"]:
    """Returns one vector for each row, which holds one text and padding (segment 0).

    Args:
      hidden: last hidden states.
      segments: as in `Transformer`.
      pooling: see `ModelConfig.pooling`.
    """
    real = segments > 0
    if pooling == "mean":
        weights = real[..., None].astype(hidden.dtype)
        return jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
    first, last = jnp.argmax(real, axis=1), real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    index = {"first": first, "last": last}[pooling]
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def classifier_head(cfg: ModelConfig) -> Linear | None:
    """Returns the projection on the labels, None for a model of tokens."""
    if not cfg.num_labels:
        return None
    shape = (cfg.embed_dim, cfg.num_labels)
    return Linear(shape, (axes.EMBED, axes.LABELS), cfg, bias=cfg.head_bias, kind="head")


def head_leaves(paths: Iterable[str]) -> frozenset[str]:
    """Returns the paths of a classifier's parameters that a model of tokens may lack."""
    return frozenset(path for path in paths if path.startswith(("classifier/", "head_transform/")))


def language_head(cfg: ModelConfig) -> Linear | nnx.Dict | None:
    """Returns the projection on the vocabulary, or only its bias where the embedding serves."""
    if cfg.num_labels:
        return None
    if not cfg.tie_embedding:
        shape = (cfg.embed_dim, cfg.vocab_size)
        return Linear(shape, (axes.EMBED, axes.VOCAB), cfg, bias=cfg.head_bias, kind="head")
    if not cfg.head_bias:
        return None
    return nnx.Dict(bias=declare(ParamSpec((cfg.vocab_size,), (axes.VOCAB,), "zeros", kind="bias")))
