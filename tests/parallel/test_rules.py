"""Dimensions are split by the table where they divide, and kept whole where they do not."""

import dataclasses
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jaxlora.core import axes
from jaxlora.ops.layout import MESH_AXES, RULES, partition
from jaxlora.ops.quantize import dequantize, pack, quantize
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement, undivided
from jaxlora.training.state import optimizer_shapes


def mesh(**sizes):
    """Stands in for a mesh of more devices than are here: the rules read its shape alone."""
    return types.SimpleNamespace(shape=dict.fromkeys(MESH_AXES, 1) | sizes)


EIGHT = mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("logical", "shape", "wanted"),
    [
        ((axes.EMBED, axes.MLP), (8, 12), (("fsdp",), ("tensor",))),
        ((axes.EMBED, axes.HEADS), (7, 12), (None, ("tensor",))),
        ((axes.EMBED, axes.KV_HEADS), (8, 3), (("fsdp",), None)),
        ((axes.VOCAB, axes.EMBED), (8, 8), (("tensor",), ("fsdp",))),
        ((None, axes.EMBED, axes.MLP), (3, 8, 8), (None, ("fsdp",), ("tensor",))),
        ((None, axes.BATCH, None), (1, 8, 16), (None, ("data", "fsdp", "expert"), None)),
        ((None, axes.BATCH, None), (1, 6, 16), (None, None, None)),
    ],
)
def test_a_dimension_is_split_if_it_divides(logical, shape, wanted):
    assert partition(EIGHT, logical, shape) == PartitionSpec(*wanted)


def test_an_axis_of_one_device_splits_nothing():
    spec = partition(mesh(data=8), (axes.EMBED, axes.MLP), (8, 8))
    assert spec == PartitionSpec(None, None)


def test_experts_and_tokens_have_an_axis_of_their_own():
    sizes = mesh(fsdp=2, expert=2, context=2)
    spec = partition(sizes, (axes.EXPERT, axes.EMBED, axes.MLP), (4, 8, 8))
    assert spec == PartitionSpec(("expert",), ("fsdp",), None)
    spec = partition(sizes, (axes.BATCH, axes.SEQUENCE, None), (4, 8, 8))
    assert spec == PartitionSpec(("data", "fsdp", "expert"), ("context",), None)


def test_a_mesh_axis_can_be_left_out():
    spec = partition(EIGHT, (axes.EMBED, axes.MLP), (8, 8), without="fsdp")
    assert spec == PartitionSpec(None, ("tensor",))


@pytest.mark.parametrize(
    ("logical", "shape", "wanted"),
    [
        ((None, axes.MLP), (4, 16), (None, ("tensor", "fsdp"))),
        ((None, axes.MLP), (4, 6), (None, ("tensor",))),
        ((axes.EXPERT, None, axes.MLP), (8, 4, 16), (None, None, ("tensor", "fsdp"))),
        ((axes.LATENT, None), (16, 4), (("fsdp",), None)),
        ((axes.EMBED, None), (16, 4), (("fsdp",), None)),
        ((axes.MLP, axes.EMBED), (16, 16), (("tensor",), ("fsdp",))),
        ((None, None), (16, 16), (None, None)),
    ],
)
def test_a_mesh_axis_can_split_the_last_named_dimension_further(logical, shape, wanted):
    assert partition(EIGHT, logical, shape, also="fsdp") == PartitionSpec(*wanted)


@pytest.mark.parametrize(
    ("logical", "size", "a", "b"),
    [
        ((axes.EMBED, axes.MLP), (16, 32), ("fsdp", None), (None, ("tensor", "fsdp"))),
        ((axes.MLP, axes.EMBED), (32, 16), (("tensor", "fsdp"), None), (None, "fsdp")),
        ((axes.EMBED, axes.KV_HEADS), (16, 6), ("fsdp", None), (None, "tensor")),
        ((axes.EMBED, axes.KV_HEADS), (16, 3), ("fsdp", None), (None, None)),
    ],
)
def test_both_arrays_of_a_pair_are_split_over_fsdp_and_their_moments_as_they_are(
    logical, size, a, b
):
    sizes = tuple(EIGHT.shape[axis] for axis in MESH_AXES)

    def put(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placement = Placement(AbstractMesh(sizes, MESH_AXES), put)
    shapes = {"a": (2, size[0], 4), "b": (2, 4, size[1]), "magnitude": (2, size[1])}
    pair = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    pair = placement.adapter(pair, logical, stacked=True)
    assert pair["a"].sharding.spec == PartitionSpec(None, *a)
    assert pair["b"].sharding.spec == PartitionSpec(None, *b)
    whole = partition(EIGHT, (None, logical[1]), shapes["magnitude"])
    assert pair["magnitude"].sharding.spec == whole
    state = optimizer_shapes(optax.adam(1e-3), pair, placement)[0]
    for moments in (state.mu, state.nu):
        assert {n: x.sharding for n, x in moments.items()} == {
            n: x.sharding for n, x in pair.items()
        }


def test_no_two_dimensions_of_a_weight_share_a_mesh_axis():
    sides = (axes.HEADS, axes.KV_HEADS, axes.MLP, axes.VOCAB)
    weights = [(axes.EMBED, side) for side in sides] + [(axes.EXPERT, axes.EMBED, axes.MLP)]
    for weight in weights:
        used = [axis for name in weight for axis in RULES[name]]
        assert len(used) == len(set(used)) >= 2, weight


def test_what_is_kept_whole_is_named():
    notes = undivided(EIGHT, (axes.EMBED, axes.KV_HEADS), (8, 3))
    assert len(notes) == 1
    assert "of 3 does not divide by 2 devices: kept whole" in notes[0]
    assert undivided(EIGHT, (axes.EMBED, axes.MLP), (8, 8)) == []


@pytest.mark.parametrize("storage", ["int4", "nf4", "int8"])
def test_a_placed_leaf_has_the_bits_it_had(storage):
    placement = Placement(make_mesh(None, jax.devices()[:1]))
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    leaf = quantize(weight, storage)
    placed = placement.weight(leaf, (axes.EMBED, axes.MLP), stacked=False)
    assert jax.tree.structure(placed) == jax.tree.structure(leaf)
    for was, now in zip(jax.tree.leaves(leaf), jax.tree.leaves(placed), strict=True):
        assert was.dtype == now.dtype
        assert np.asarray(was).tobytes() == np.asarray(now).tobytes()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_packed_leaf_is_placed_as_the_int4_it_stands_for(ordered):
    placement = Placement(make_mesh(None, jax.devices()[:1]))
    weight = np.random.default_rng(0).standard_normal((2, 64, 8)).astype(np.float32)
    layers = [quantize(layer, "int4", group_size=16) for layer in weight]
    leaf = jax.tree.map(lambda *parts: np.stack(parts), *layers)
    groups = np.random.default_rng(1).integers(0, 4, (2, 64)).astype(np.int32)
    zeros = np.ones(leaf.scales.shape, np.int8)
    leaf = dataclasses.replace(leaf, zeros=zeros, groups=groups if ordered else None)
    placed = placement.weight(pack(leaf), (axes.EMBED, axes.MLP), stacked=True)
    assert placed.values.dtype == jax.numpy.int4
    assert jax.tree.structure(placed) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(dequantize(placed), dequantize(leaf))
    assert (np.asarray(dequantize(placed)) != dequantize(layers[0])).any()


def test_a_batch_keeps_its_values_and_dtypes():
    placement = Placement(make_mesh(None, jax.devices()[:1]))
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(2, 3, 4)}
    placed = placement.batch(batch)["tokens"]
    assert placed.dtype == np.int32
    np.testing.assert_array_equal(placed, batch["tokens"])
