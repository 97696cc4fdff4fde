"""Mesh sizes multiply to the devices, or the user is told."""

import pytest

from jaxlora.core.errors import UserError
from jaxlora.parallel import mesh as meshes


@pytest.fixture
def sizes_of(monkeypatch):
    """``sizes_of(sizes, count)``: the axis sizes asked of JAX for so many devices."""
    monkeypatch.setattr(
        meshes.jax, "make_mesh", lambda shape, names, **_: dict(zip(names, shape, strict=True))
    )
    return lambda sizes, count: tuple(meshes.make_mesh(sizes, list(range(count))).values())


@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [
        (None, 8, (1, 8, 1)),
        ({}, 8, (1, 8, 1)),
        ({"data": -1}, 8, (8, 1, 1)),
        ({"data": 2, "fsdp": -1}, 8, (2, 4, 1)),
        ({"tensor": 2, "fsdp": -1}, 2, (1, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
        ({"fsdp": 1}, 1, (1, 1, 1)),
    ],
)
def test_sizes_are_completed_to_all_devices(sizes_of, sizes, count, wanted):
    assert sizes_of(sizes, count) == wanted


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "unknown axis 'model'; expected data, fsdp, tensor"),
        ({"data": 0}, "data: 0; expected 1 or more"),
        ({"data": -2}, "data: -2; expected 1 or more"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1, got data and fsdp"),
        ({"data": 3}, "needs 3 devices, 8 are here"),
        ({"data": 3, "fsdp": -1}, "needs 3 devices, 8 are here"),
        ({"data": 16}, "needs 16 devices, 8 are here"),
    ],
)
def test_impossible_sizes_are_refused(sizes_of, sizes, message):
    with pytest.raises(UserError, match=r"^mesh: ") as refusal:
        sizes_of(sizes, 8)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_batch_is_split_over_data_and_fsdp():
    devices = meshes.jax.devices()[:1]
    assert meshes.batch_shards(meshes.make_mesh(None, devices)) == 1
