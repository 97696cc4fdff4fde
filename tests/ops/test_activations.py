"""Activations of 16-bit inputs are rounded once, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops.activations import ACTIVATIONS


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - {"gelu_new", "gelu_fast"}))
def test_sixteen_bits_are_rounded_once(name):
    activation = jax.jit(jax.vmap(jax.value_and_grad(ACTIVATIONS[name])))
    x = jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
    value, gradient = activation(x)
    wide_value, wide_gradient = activation(x.astype(jnp.float32))
    np.testing.assert_array_equal(value, wide_value.astype(jnp.bfloat16))
    np.testing.assert_array_equal(gradient, wide_gradient.astype(jnp.bfloat16))


def test_the_gradient_keeps_nothing_but_the_input():
    x = jnp.ones((8, 4), jnp.bfloat16)
    _, back = jax.vjp(ACTIVATIONS["silu"], x)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.size == x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
