"""The TPU kernel, interpreted on a CPU: it gives the reference's bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops import dequantize_tpu, nf4
from jaxlora.ops.arrays import LoraArray
from jaxlora.ops.matmul import matmul
from jaxlora.ops.quantize import dequantize, pack, quantize
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.planning.leaves import note

# Format, inputs, outputs, group: several blocks either way, blocks that run over both edges, one
# group, codes of a table with scales in 8 bits and in 32.
CASES = [
    ("int4", 1024, 1152, 32),
    ("int4", 704, 200, 64),
    ("int4", 576, 1200, 576),
    ("int4", 1280, 40, 128),
    ("nf4", 576, 200, True),
    ("nf4", 64, 24, False),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def host_leaf(format, rows, columns, option, dtype="bfloat16"):
    """A leaf as it is read; `option` is int4's group, or whether nf4's scales are quantized."""
    name = "group_size" if format == "int4" else "double_quant"
    return quantize(normal(rows, columns), format, dtype=dtype, **{name: option})


def for_kernel(leaf):
    """What a TPU has of it, for the kernel in Python."""
    values = leaf.values if leaf.format == "int4" else nf4.by_input(jnp.asarray(leaf.values))
    return dataclasses.replace(leaf, values=values, kernel="interpret")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_gives_the_references_bits(case, dtype):
    leaf = host_leaf(*case, dtype)
    assert dequantize_tpu.groups_of(leaf)
    assert for_kernel(leaf).shape == leaf.shape
    ours, reference = (jax.jit(dequantize)(x) for x in (for_kernel(leaf), leaf))
    assert ours.dtype == dtype
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(reference))


@pytest.mark.parametrize(("format", "magnitude"), [("int4", None), ("nf4", jnp.ones(48))])
def test_products_and_gradients_are_those_of_the_reference(format, magnitude):
    leaf = host_leaf(format, 128, 48, 32, "float32")
    a, b = jnp.asarray(normal(128, 4, seed=1)), jnp.asarray(normal(4, 48, seed=2))
    x = jnp.asarray(normal(6, 128, seed=3))

    def grads(leaf):
        def loss(x, a, b):
            y = matmul(x, LoraArray(leaf, a, b, jnp.float32(0.5), magnitude))
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, a, b)

    for ours, reference in zip(
        jax.tree.leaves(grads(for_kernel(leaf))), jax.tree.leaves(grads(leaf)), strict=True
    ):
        # Sums of 128 products in float32, in another order where the matrix lies the other way.
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_layers_of_a_stack_are_read_as_a_scan_slices_them(format):
    one, other = host_leaf(format, 64, 40, 32), host_leaf(format, 64, 40, 32)
    other = dataclasses.replace(other, values=other.values[::-1])
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), one, other)
    _, read = jax.lax.scan(lambda carry, leaf: (carry, dequantize(leaf)), 0, for_kernel(stack))
    np.testing.assert_array_equal(read, dequantize(stack))
    # Taken whole, a stack is not the kernel's.
    np.testing.assert_array_equal(dequantize(for_kernel(stack)), read)


def test_the_kernel_is_for_tpus_and_matrices_it_can_read():
    placement, leaf = Placement(make_mesh({})), host_leaf("int4", 128, 8, 32)

    def chosen(leaf, chip="TPU v6 lite", axes=("embed", "mlp")):
        return placement.kernel_for(leaf, axes, chip)

    assert chosen(leaf) == chosen(pack(leaf)) == chosen(quantize(normal(128, 8), "nf4")) == "tpu"
    assert chosen(leaf, "TPU v5 lite") == chosen(leaf, "NVIDIA H100 80GB HBM3") == ""
    assert chosen(leaf, axes=("experts", "embed", "mlp")) == ""
    assert placement.weight(pack(leaf), ("embed", "mlp"), stacked=False).kernel == ""
    for odd in (
        host_leaf("int4", 96, 8, 16),
        host_leaf("int4", 192, 8, 96),
        dataclasses.replace(leaf, zeros=np.zeros((4, 8), np.int8)),
        dataclasses.replace(leaf, groups=np.zeros(128, np.int32)),
        quantize(normal(80, 8), "nf4"),
        quantize(normal(128, 8), "int8"),
    ):
        assert chosen(odd) == ""


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_what_a_tpu_is_given_is_what_the_kernel_reads(monkeypatch, format):
    placement = Placement(make_mesh({}))
    monkeypatch.setattr(placement, "kernel_for", lambda *arguments: "interpret")
    leaf = host_leaf(format, 128, 8, 32)
    placed = placement.weight(pack(leaf), ("embed", "mlp"), stacked=False)
    assert placed.kernel == "interpret"
    assert placed.shape == leaf.shape
    np.testing.assert_array_equal(dequantize(placed), dequantize(leaf))
    noted = Placement(placement.mesh, note)
    monkeypatch.setattr(noted, "kernel_for", lambda *arguments: "interpret")
    shapes = noted.weight(leaf, ("embed", "mlp"), stacked=False)
    assert (shapes.shape, shapes.values.dtype) == (placed.shape, placed.values.dtype)
