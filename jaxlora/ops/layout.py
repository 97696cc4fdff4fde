"""Which mesh axes an array's logical axes are split over: one table for weights and activations."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from jaxlora.core import axes

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
"""From the slowest links to the fastest: neighbours on the last axis exchange the most."""

# Weights are sharded over `fsdp` along the embedding and split over `tensor` along the other side,
# so one gather over `fsdp` serves a layer. Rows are split over `expert` too: between the experts
# every device has tokens of its own.
RULES: dict[str, tuple[str, ...]] = {
    axes.BATCH: ("data", "fsdp", "expert"),
    axes.SEQUENCE: ("context",),
    axes.EMBED: ("fsdp",),
    axes.HEADS: ("tensor",),
    axes.KV_HEADS: ("tensor",),
    axes.MLP: ("tensor",),
    axes.VOCAB: ("tensor",),
    axes.EXPERT: ("expert",),
}


def ways(mesh: Any, logical: str | None, *, without: str = "") -> int:
    """Returns into how many parts `mesh` splits a logical axis."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(logical, without))


def partition(
    mesh: Any,
    logical: Sequence[str | None],
    shape: Sequence[int],
    *,
    without: str = "",
    also: str = "",
) -> PartitionSpec:
    """Returns how an array is split; a dimension that does not divide is kept whole.

    Args:
      mesh: the device mesh, abstract or not.
      logical: logical axis of each dimension, None for "never split".
      shape: size of each dimension.
      without: a mesh axis to leave out.
      also: a mesh axis that splits the last named dimension further, after the table's, if it
        divides and if the table splits no dimension over it.
    """
    split = [
        _divided(mesh, _mesh_axes(name, without), size)
        for name, size in zip(logical, shape, strict=True)
    ]
    named = [dimension for dimension, name in enumerate(logical) if name is not None]
    if also and named and also not in sum(split, ()):
        last = named[-1]
        split[last] = _divided(mesh, (*split[last], also), shape[last]) or split[last]
    return PartitionSpec(*(mesh_axes or None for mesh_axes in split))


def left_out(spec: PartitionSpec, mesh_axes: Collection[str]) -> PartitionSpec:
    """Returns `spec` without these mesh axes.

    >>> tuple(left_out(PartitionSpec(("fsdp", "tensor"), "fsdp"), ("fsdp",)))
    ('tensor', None)
    """
    entries = []
    for entry in spec:
        # An entry is None, the name of a mesh axis or a tuple of names.
        names = (entry,) if isinstance(entry, str) else entry or ()
        entries.append(tuple(axis for axis in names if axis not in mesh_axes) or None)
    return PartitionSpec(*entries)


def _divided(mesh: Any, mesh_axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """These mesh axes if they split a dimension of this size, else none."""
    parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
    return mesh_axes if parts > 1 and size % parts == 0 else ()


def _mesh_axes(logical: str | None, without: str) -> tuple[str, ...]:
    return tuple(axis for axis in RULES.get(logical or "", ()) if axis != without)
