"""The device mesh: ``data`` (replicas), ``fsdp`` (sharded weights), ``tensor`` (split layers)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxlora.core.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over all devices.

    Args:
      sizes: devices along each axis; at most one -1 takes what is left, an absent axis is 1.
        None shards weights over every device (``fsdp: -1``).
      devices: default all of them.

    Raises:
      UserError: an unknown axis, or sizes that do not multiply to the number of devices.

    >>> dict(make_mesh({"data": -1}, jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(sizes or {"fsdp": -1})
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise UserError(f"mesh: unknown axis {axis!r}; expected {', '.join(MESH_AXES)}.")
        if size != -1 and size < 1:
            raise UserError(f"mesh: {axis}: {size}; expected 1 or more, or -1 for what is left.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh: only one axis can be -1, got {' and '.join(open_axes)}.")
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"mesh: {dict(sizes)} needs {fixed} devices, {len(devices)} are here; make the sizes "
            "multiply to that, or set one of them to -1."
        )
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Returns how many ways the batch is split: the product of ``data`` and ``fsdp``."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
