"""What stands between the last hidden states and the logits."""

from flax import nnx
from jaxtyping import Array, Float

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


def language_head(cfg: ModelConfig) -> Linear | nnx.Dict | None:
    """Returns the projection on the vocabulary, or only its bias where the embedding serves."""
    if not cfg.tie_embedding:
        shape = (cfg.embed_dim, cfg.vocab_size)
        return Linear(shape, (axes.EMBED, axes.VOCAB), cfg, bias=cfg.head_bias, kind="head")
    if not cfg.head_bias:
        return None
    return nnx.Dict(bias=declare(ParamSpec((cfg.vocab_size,), (axes.VOCAB,), "zeros", kind="bias")))
