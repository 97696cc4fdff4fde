"""Logits at a few fixed tokens: what comparing two forms of one model looks at."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxlora.core.tree import Tree
from jaxlora.models.config import ModelConfig
from jaxlora.models.transformer import Transformer, bind

_ROWS, _LENGTH = 2, 32


def probe_tokens(cfg: ModelConfig) -> Int[np.ndarray, "B T"]:
    """Returns the tokens: random, the same for every model of this vocabulary and context."""
    length = min(_LENGTH, cfg.max_context)
    # RoBERTa counts positions past its padding token, so that one is left out.
    first = cfg.position_offset
    return np.random.default_rng(0).integers(first, cfg.vocab_size, (_ROWS, length))


def probe_logits(cfg: ModelConfig, params: Tree) -> Float[np.ndarray, "B T V"]:
    """Returns the logits at `probe_tokens`, computed in float32 whatever stores the weights."""
    tokens = probe_tokens(cfg)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    model = bind(Transformer(cfg), params)
    with jax.default_matmul_precision("float32"):
        hidden, _ = model(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
        return np.asarray(model.logits(model.pooled(hidden, jnp.ones_like(tokens))))
