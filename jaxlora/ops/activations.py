"""Activation functions by the names Hugging Face configs use."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def clamped_swiglu(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"], *, clamp: float, gain: float
) -> Float[Array, "*B F"]:
    """Returns ``(up + 1) * gate * sigmoid(gain * gate)``, both cut off at `clamp` (gpt-oss)."""
    gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
    return (up + 1) * gate * jax.nn.sigmoid(gain * gate)
