"""A pair that is split over `fsdp` is gathered where it is used; others are left alone."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec, SingleDeviceSharding

from jaxlora.core import axes
from jaxlora.ops.layout import MESH_AXES
from jaxlora.parallel.rules import Placement
from jaxlora.training.gathering import gathered_pairs


def target(**fields):
    """Stands in for `lora.Target`: which kind of leaf it is."""
    kinds = {"vector": False, "embedding": False, "experts": 0, "stacked": True}
    return types.SimpleNamespace(**kinds | fields)


def placed(logical, *, stacked=True, **sizes):
    """Shardings of a pair of rank 4 on a mesh of these sizes."""
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes
    mesh = AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES)
    lead = (2,) if stacked else ()
    pair = {"a": np.zeros((*lead, 32, 4)), "b": np.zeros((*lead, 4, 64))}
    return Placement(mesh, lambda x, sharding: sharding).adapter(pair, logical, stacked=stacked)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("logical", "a", "b"),
    [
        ((axes.EMBED, axes.MLP), (None, None), (None, "tensor")),
        ((axes.MLP, axes.EMBED), ("tensor", None), (None, None)),
    ],
)
def test_a_layers_pair_is_whole_but_for_tensor(logical, a, b, stacked):
    pair = placed(logical, stacked=stacked, fsdp=4, tensor=2)
    assert any("fsdp" in str(sharding.spec) for sharding in pair.values())
    found = gathered_pairs({"w": pair}, {"w": target(stacked=stacked)})["w"]
    assert [each.spec for each in found] == [PartitionSpec(*a), PartitionSpec(*b)]


@pytest.mark.parametrize("kind", [{"vector": True}, {"embedding": True}, {"experts": 8}])
def test_leaves_of_other_kinds_are_left_alone(kind):
    pair = placed((axes.EMBED, axes.MLP), fsdp=4)
    assert gathered_pairs({"w": pair}, {"w": target(**kind)}) == {}


def test_a_pair_that_is_not_split_over_fsdp_is_left_alone():
    pair = placed((axes.EMBED, axes.MLP), data=2, tensor=2)
    alone = dict.fromkeys("ab", SingleDeviceSharding(jax.devices()[0]))
    assert gathered_pairs({"w": pair, "v": alone}, {"w": target(), "v": target()}) == {}
