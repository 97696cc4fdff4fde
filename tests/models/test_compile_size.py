"""Layers are scanned: what is compiled does not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxlora.core.tree import unflatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind

UNIFORM = ModelConfig(
    vocab_size=31,
    embed_dim=8,
    mlp_dim=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_context=32,
    norm_eps=1e-5,
)


def uniform(depth):
    return dataclasses.replace(UNIFORM, num_layers=depth)


def sliding_and_full(depth):
    """Gemma 3's pattern of windows and rotary bases."""
    sliding = tuple(layer for layer in range(depth) if (layer + 1) % 2)
    return dataclasses.replace(
        uniform(depth), sliding_window=5, sliding_layers=sliding, local_rope_theta=100.0
    )


def unlike_layers(depth):
    """A period of two layers with different parameters."""
    return dataclasses.replace(uniform(depth), bare_layers=tuple(range(1, depth, 2)))


def equations(jaxpr) -> int:
    """Counts the operations of a jaxpr and of those inside it."""
    return sum(1 + sum(equations(each) for each in _inner(eqn.params)) for eqn in jaxpr.eqns)


def _inner(params):
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def gradient_size(cfg) -> int:
    shapes = {p: jax.ShapeDtypeStruct(s.full_shape, jnp.float32) for p, s in describe(cfg).items()}
    tokens = jnp.zeros((1, 7), jnp.int32)
    positions = jnp.arange(7)[None]

    def loss(params):
        model = bind(Transformer(cfg), params)
        return model.logits(model(tokens, positions, jnp.ones_like(tokens))[0]).sum()

    return equations(jax.make_jaxpr(jax.grad(loss))(unflatten(shapes)).jaxpr)


@pytest.mark.parametrize("make", [uniform, sliding_and_full, unlike_layers])
def test_the_gradient_of_8_layers_is_no_larger_program_than_of_4(make):
    size = gradient_size(make(4))
    assert size > 50
    assert gradient_size(make(8)) == size
