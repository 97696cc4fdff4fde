"""The device mesh: how many devices lie along each axis, and which of them are neighbours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxlora.core import axes
from jaxlora.core.errors import UserError
from jaxlora.ops.layout import MESH_AXES, ways


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over all devices.

    Several slices (TPU pods joined by a data-centre network) are told apart along `data`, and along
    `fsdp` where `data` is too small: what crosses the slow network is then one gradient a step.

    Args:
      sizes: devices along each axis; at most one -1 takes what is left, an absent axis is 1.
        None shards weights over the devices of a slice (``data: number of slices, fsdp: -1``).
      devices: default all of them.

    Raises:
      UserError: an unknown axis, or sizes that do not multiply to the number of devices, or slices
        that do not fit `data` and `fsdp`.

    >>> dict(make_mesh({"data": -1}, jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'expert': 1, 'context': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    wanted = check_slices(sizes, len(devices), slices)
    shape = tuple(wanted.get(axis, 1) for axis in MESH_AXES)
    if slices > 1:
        laid_out = _across_slices(wanted, shape, slices, devices)
    else:
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_slices(sizes: Mapping[str, int] | None, count: int, slices: int) -> dict[str, int]:
    """Returns the sizes of a mesh over `count` devices, with what is -1 or by default filled in.

    Raises:
      UserError: see `make_mesh`.

    >>> check_slices(None, 32, 2), check_slices({"fsdp": -1, "context": 4}, 32, 2)
    ({'data': 2, 'fsdp': 16}, {'fsdp': 8, 'context': 4})
    """
    wanted = _completed(sizes or {"data": slices, "fsdp": -1}, count)
    within_data = math.gcd(wanted.get("data", 1), slices)
    if wanted.get("fsdp", 1) % (slices // within_data):
        raise UserError(
            f"mesh: {slices} slices do not fit {wanted}: tensor, context and expert stay "
            f"within a slice; make data a multiple of {slices}."
        )
    return wanted


def _completed(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`sizes` with the axis that is -1 filled in."""
    sizes = dict(sizes)
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise UserError(f"mesh: unknown axis {axis!r}; expected {', '.join(MESH_AXES)}.")
        if size != -1 and size < 1:
            raise UserError(f"mesh: {axis}: {size}; expected 1 or more, or -1 for what is left.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh: only one axis can be -1, got {' and '.join(open_axes)}.")
    if open_axes and count % fixed == 0:
        sizes[open_axes[0]] = count // fixed
    elif fixed != count:
        raise UserError(
            f"mesh: {sizes} needs {fixed} devices, {count} are here; make the sizes "
            "multiply to that, or set one of them to -1."
        )
    return sizes


def _across_slices(
    sizes: Mapping[str, int], shape: tuple[int, ...], slices: int, devices: Sequence[Any]
) -> np.ndarray:
    """Devices in the shape of the mesh, those of one slice together."""
    data = math.gcd(sizes.get("data", 1), slices)
    outer = {"data": data, "fsdp": slices // data}
    between = tuple(outer.get(axis, 1) for axis in MESH_AXES)
    within = tuple(size // split for size, split in zip(shape, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def batch_shards(mesh: Mesh) -> int:
    """Returns how many ways the rows of a batch are split: over `data`, `fsdp` and `expert`."""
    return ways(mesh, axes.BATCH)
