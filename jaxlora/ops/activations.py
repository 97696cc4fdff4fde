"""Activation functions by the names Hugging Face configs use."""

from collections.abc import Callable
from functools import partial, wraps

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[jax.Array], jax.Array]


def _rounded_once(function: Activation) -> Activation:
    """The function of a 16-bit input in float32, as torch computes it.

    In 16 bits each of its steps would be rounded. The gradient keeps the input alone.
    """

    @jax.custom_vjp
    def rounded(x):
        return function(x.astype(jnp.float32)).astype(x.dtype)

    def backward(x, dy):
        _, pull = jax.vjp(function, x.astype(jnp.float32))
        return (pull(dy.astype(jnp.float32))[0].astype(x.dtype),)

    rounded.defvjp(lambda x: (rounded(x), x), backward)

    @wraps(function)
    def activation(x):
        return rounded(x) if x.dtype.itemsize < 4 else function(x)

    return activation


_SILU = _rounded_once(jax.nn.silu)
_GELU_BY_TANH = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Activation] = {
    "silu": _SILU,
    "swish": _SILU,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": _rounded_once(jnp.tanh),
    "gelu": _rounded_once(partial(jax.nn.gelu, approximate=False)),
    # transformers has these two as Python expressions, which round at each step.
    "gelu_new": _GELU_BY_TANH,
    "gelu_fast": _GELU_BY_TANH,
    "gelu_pytorch_tanh": _rounded_once(_GELU_BY_TANH),
}


def clamped_swiglu(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"], *, clamp: float, gain: float
) -> Float[Array, "*B F"]:
    """Returns ``(up + 1) * gate * sigmoid(gain * gate)``, both cut off at `clamp` (gpt-oss)."""
    gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
    return (up + 1) * gate * jax.nn.sigmoid(gain * gate)
