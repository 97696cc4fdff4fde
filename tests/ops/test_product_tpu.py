"""The TPU kernel of whole products, interpreted on a CPU, against unpacking first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dequantize_tpu import for_kernel, host_leaf, normal

from jaxlora.ops import product_tpu, quantize
from jaxlora.ops.arrays import LoraArray
from jaxlora.ops.matmul import matmul
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement

# Format, inputs, outputs, group (nf4: whether scales are quantized), tokens, rank. With sides of at
# most 512 and 304 tokens a block: one block or several of each axis, tokens that fill no block.
CASES = [
    ("int4", 512, 256, 32, 300, 4),
    ("int4", 1536, 512, 64, 320, 8),
    ("int4", 1024, 1536, 64, 600, 16),
    ("nf4", 1536, 1024, True, 304, 16),
    ("nf4", 512, 768, False, 610, 3),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(product_tpu, "_SIDE", 512)
    monkeypatch.setattr(product_tpu, "_TOKENS", 304)
    monkeypatch.setattr(product_tpu, "_FEWEST_TOKENS", 256)


@pytest.fixture
def calls(monkeypatch):
    """Directions in which the kernel was called."""
    found, product = [], product_tpu.product

    def noted(*arguments, **options):
        found.append("backward" if options["turned"] else "forward")
        return product(*arguments, **options)

    monkeypatch.setattr(product_tpu, "product", noted)
    return found


def leaf_of(case):
    return dataclasses.replace(for_kernel(host_leaf(*case[:4])), product=True)


def tokens_of(case, axis=1):
    return jnp.asarray(normal(case[4], case[axis], seed=3), jnp.bfloat16)


def pulled(weight, x, a=None, b=None, *, magnitude=None, key=None):
    """A product and the gradients of a fixed random projection of it, in float64."""

    def multiply(x, a, b):
        if a is None:
            return matmul(x, weight)
        scale = jnp.float32(0.5)
        return matmul(x, LoraArray(weight, a, b, scale, magnitude, key, 0.1))

    y, back = jax.vjp(multiply, x, a, b)
    dy = jnp.asarray(normal(*y.shape, seed=9), y.dtype)
    return [np.asarray(z, np.float64) for z in jax.tree.leaves((y, back(dy)))]


def pair_of(case):
    _, rows, columns, _, _, rank = case
    a = jnp.asarray(normal(rows, rank, seed=1)) / rows**0.5
    return a, jnp.asarray(normal(rank, columns, seed=2))


def assert_close(ours, theirs, ulps):
    """Within so many roundings of a number of the results' own size to bfloat16."""
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(one - other).max() <= ulps * 2**-8 * np.abs(other).max()


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_unpacked_matrix(case, calls):
    leaf, x = leaf_of(case), tokens_of(case)
    ours = pulled(leaf, x)
    assert calls == ["forward", "backward"]
    theirs = pulled(dataclasses.replace(leaf, product=False), x)
    # Sums in another order, rounded once either way: now and then to the other neighbour.
    assert_close(ours, theirs, 1)
    assert max(np.mean(one != other) for one, other in zip(ours, theirs, strict=True)) < 0.01


def test_a_block_has_eight_groups(monkeypatch, calls):
    case = ("int4", 2048, 256, 128, 256, 4)
    assert not quantize.multiplies(tokens_of(case), leaf_of(case))
    monkeypatch.setattr(product_tpu, "_SIDE", 1024)
    test_products_are_those_of_the_unpacked_matrix(case, calls)


@pytest.mark.parametrize("case", CASES)
def test_a_pair_is_added_before_the_sum_is_rounded(case, calls):
    leaf, x, pair = leaf_of(case), tokens_of(case), pair_of(case)
    ours = pulled(leaf, x, *pair)
    assert calls == ["forward", "backward"]
    theirs = pulled(dataclasses.replace(leaf, product=False), x, *pair)
    # Two products that are added up are rounded three times.
    assert_close(ours, theirs, 2)


def test_a_sum_with_a_pair_is_nearer_to_the_exact_one():
    case = CASES[1]
    leaf, x, (a, b) = leaf_of(case), tokens_of(case), pair_of(case)
    h = (x @ a.astype(x.dtype)) * jnp.bfloat16(0.5)
    factors = (x, quantize.dequantize(leaf), h, b.astype(x.dtype))
    x64, w64, h64, b64 = (np.asarray(each, np.float64) for each in factors)
    exact = x64 @ w64 + h64 @ b64
    errors = [
        np.abs(pulled(each, x, a, b)[0] - exact).mean()
        for each in (leaf, dataclasses.replace(leaf, product=False))
    ]
    assert errors[0] < 0.8 * errors[1]  # one rounding, not three


def test_magnitude_bias_and_dropout_are_those_of_two_products(calls):
    case = CASES[1]
    leaf, x, pair = leaf_of(case), tokens_of(case), pair_of(case)
    two = dataclasses.replace(leaf, product=False)
    gains = jnp.asarray(1 + 0.3 * normal(case[2], seed=5))
    ours, theirs = (pulled(each, x, *pair, magnitude=gains) for each in (leaf, two))
    assert_close(ours, theirs, 2)
    assert calls == ["forward", "backward"]
    # Dropout: the pair has another input than the base, whose product alone is the kernel's.
    key = jax.random.key_data(jax.random.key(0))
    ours, theirs = (pulled(each, x, *pair, key=key) for each in (leaf, two))
    assert_close(ours, theirs, 2)
    assert calls == ["forward", "backward"] * 2


def test_layers_of_a_stack_are_multiplied_as_a_scan_slices_them(calls):
    case = CASES[0]
    one = leaf_of(case)
    other = dataclasses.replace(one, values=one.values[::-1])
    stack = jax.tree.map(lambda *parts: jnp.stack([*map(jnp.asarray, parts)]), one, other)
    x = tokens_of(case)
    _, both = jax.lax.scan(lambda carry, leaf: (carry, matmul(x, leaf)), 0, stack)
    assert calls == ["forward"]
    for ours, leaf in zip(both, (one, other), strict=True):
        np.testing.assert_array_equal(ours, matmul(x, leaf))


def test_what_the_kernel_does_not_serve_is_unpacked_first(calls):
    leaf, x = leaf_of(CASES[0]), tokens_of(CASES[0])
    few, wide = x[:255], x.astype(jnp.float32)
    matmul(few, leaf)
    matmul(wide, leaf)
    matmul(x, dataclasses.replace(leaf, dtype="float32"))
    for odd in (("int4", 512, 320, 64), ("int4", 576, 256, 64), ("int4", 512, 256, 512)):
        odd_leaf = leaf_of(odd)
        assert quantize.multiplies(x, odd_leaf) is False
    assert not calls
    assert product_tpu.serves(2048, (512, 256), 32, 256)
    assert not product_tpu.serves(2048, (512, 256), 32, 257)


def test_products_are_the_kernels_on_a_v6e(monkeypatch):
    def placed(chip):
        placement = Placement(make_mesh({}))
        monkeypatch.setattr(placement, "kernel_for", lambda *leaf: "interpret")
        monkeypatch.setattr(placement, "chip", chip)
        return placement.weight(host_leaf(*CASES[0][:4]), ("embed", "mlp"), stacked=False)

    assert placed("TPU v6 lite").product
    assert not placed("TPU v5 lite").product
