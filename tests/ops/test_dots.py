"""Products summed in float32: numbers, gradients, and the form that each platform is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops.dots import contract, matrix_product


@pytest.fixture(name="factors")
def _factors():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 8, 16), (16, 4), (2, 8, 4))
    return [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]


def test_product_is_the_float32_sum_rounded_once(factors):
    x, weight, _ = factors
    exact = np.asarray(x, np.float32) @ np.asarray(weight, np.float32)
    y = contract("...I,IO->...O", x, weight)
    # Half a unit in the last place of bfloat16 (8 bits), and float32 sums in another order.
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(jax.vmap(lambda row: contract("TI,IO->TO", row, weight))(x), y)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_are_those_of_the_plain_product(factors, dtype):
    x, weight, dy = (each.astype(dtype) for each in factors)

    def loss(product, x, weight):
        return jnp.sum((product(x, weight) * dy).astype(jnp.float32))

    ours = jax.grad(functools.partial(loss, lambda x, w: matrix_product(x, w, x.dtype)), (0, 1))
    plain = jax.grad(functools.partial(loss, jnp.matmul), (0, 1))
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 1e-5  # one rounding more or less
    for got, wanted in zip(ours(x, weight), plain(x, weight), strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=tolerance, atol=1e-2
        )


def test_a_frozen_weight_needs_no_input():
    x, weight = jnp.ones((8, 16)), jnp.ones((16, 4))
    _, pull = jax.vjp(lambda x: matrix_product(x, weight, x.dtype), x)
    assert {leaf.shape for leaf in jax.tree.leaves(pull)} == {(16, 4)}
    _, pull = jax.vjp(lambda weight: matrix_product(x, weight, x.dtype), weight)
    assert {leaf.shape for leaf in jax.tree.leaves(pull)} == {(8, 16)}


def test_cpus_get_a_float32_result_and_others_the_plain_dot(factors):
    x, weight, _ = factors
    traced = jax.jit(lambda x, weight: contract("...I,IO->...O", x, weight)).trace(x, weight)
    plain = jax.jit(lambda x, weight: jnp.matmul(x, weight)).trace(x, weight)

    def program(traced, platform):
        lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        return [line for line in lines if "stablehlo." in line]

    for platform in ("tpu", "cuda"):
        assert program(traced, platform) == program(plain, platform)
    (dot, rounding) = program(traced, "cpu")
    assert dot.endswith("-> tensor<2x8x4xf32>")
    assert "stablehlo.convert" in rounding
