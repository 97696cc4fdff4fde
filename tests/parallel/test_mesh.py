"""Mesh sizes multiply to the devices, or the user is told."""

import types

import pytest

from jaxlora.core.errors import UserError
from jaxlora.parallel import mesh as meshes


class Device(types.SimpleNamespace):
    """Stands in for a device that is not here."""

    device_kind = platform = "cpu"
    __hash__ = object.__hash__


def sizes_of(sizes, count):
    return dict(meshes.make_mesh(sizes, [Device(id=i) for i in range(count)]).shape)


@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [
        (None, 8, {"fsdp": 8}),
        ({}, 8, {"fsdp": 8}),
        ({"data": -1}, 8, {"data": 8}),
        ({"data": 2, "fsdp": -1}, 8, {"data": 2, "fsdp": 4}),
        ({"tensor": 2, "fsdp": -1}, 2, {"tensor": 2}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"context": 2, "expert": -1}, 8, {"context": 2, "expert": 4}),
        ({"fsdp": 1}, 1, {}),
    ],
)
def test_sizes_are_completed_to_all_devices(sizes, count, wanted):
    assert sizes_of(sizes, count) == dict.fromkeys(meshes.MESH_AXES, 1) | wanted


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "unknown axis 'model'; expected data, fsdp, expert, context, tensor"),
        ({"data": 0}, "data: 0; expected 1 or more"),
        ({"data": -2}, "data: -2; expected 1 or more"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1, got data and fsdp"),
        ({"data": 3}, "needs 3 devices, 8 are here"),
        ({"data": 3, "fsdp": -1}, "needs 3 devices, 8 are here"),
        ({"data": 16}, "needs 16 devices, 8 are here"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(UserError, match=r"^mesh: ") as refusal:
        sizes_of(sizes, 8)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_rows_are_split_over_all_axes_but_those_of_a_layer():
    shape = dict(zip(meshes.MESH_AXES, (2, 3, 5, 7, 11), strict=True))
    assert shape == {"data": 2, "fsdp": 3, "expert": 5, "context": 7, "tensor": 11}
    assert meshes.batch_shards(types.SimpleNamespace(shape=shape)) == 2 * 3 * 5


class Chip(Device):
    """A TPU chip of one of several slices."""

    device_kind, platform, process_index = "TPU v5 lite", "tpu", 0


def chips(slices, each):
    """Slices of a `1 x each` torus; chips of different slices alternate in the list."""
    return [
        Chip(id=s * each + i, slice_index=s, coords=(i, 0, 0), core_on_chip=0)
        for i in range(each)
        for s in range(slices)
    ]


@pytest.mark.parametrize(
    ("sizes", "data", "fsdp"),
    [
        (None, 2, 4),
        ({"data": 4, "fsdp": 2}, 4, 2),
        ({"fsdp": 8}, 1, 8),
        ({"data": 2, "tensor": 4}, 2, 1),
    ],
)
def test_slices_lie_apart_on_the_outermost_axis(sizes, data, fsdp):
    mesh = meshes.make_mesh(sizes, chips(2, 4))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (data, fsdp)
    # In the order of the axes, every device of a slice comes before any of the next.
    assert [chip.slice_index for chip in mesh.devices.flat] == [0] * 4 + [1] * 4


def test_layers_are_not_split_between_slices():
    with pytest.raises(UserError, match=r"2 slices do not fit .*make data a multiple of 2"):
        meshes.make_mesh({"tensor": 8}, chips(2, 4))
