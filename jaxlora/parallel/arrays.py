"""Arrays on the devices of all processes, and back on the host of one."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxlora.parallel import processes

PIECE_BYTES = 64 * 2**20  # of an array that moves between processes: it is whole on every device


def place(x: Any, sharding: Sharding) -> jax.Array:
    """Returns an array on the devices of `sharding`; every process hands over its own parts.

    Args:
      x: host array, the same on every process where its parts are read, or an array on devices.
      sharding: where it goes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding, may_alias=True)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(tree: Any) -> Any:
    """Returns a tree's arrays on the host of process 0, None on the others; all must call it.

    In pieces: beside the result a device or a process holds `PIECE_BYTES` of it at a time.
    """

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                return _gathered(leaf)
            leaf = leaf.addressable_data(0)
        return np.array(leaf) if processes.is_first() else None

    fetched = jax.tree.map(whole, tree)
    return fetched if processes.is_first() else None


def spread(tree: Any, like: Any) -> Any:
    """Returns process 0's arrays on all devices, bit for bit; all must call it.

    Args:
      tree: host arrays on process 0; not read on the others.
      like: arrays of the same shapes, dtypes and the shardings wanted.
    """
    leaves, structure = jax.tree.flatten(like)
    hosts = jax.tree.leaves(tree) if processes.is_first() else [None] * len(leaves)
    placed = [place(_received(*pair), pair[1].sharding) for pair in zip(hosts, leaves, strict=True)]
    return jax.tree.unflatten(structure, placed)


def _gathered(leaf: jax.Array) -> np.ndarray | None:
    """A leaf that is split over processes, whole on the host of process 0."""
    host = np.empty(leaf.shape, leaf.dtype) if processes.is_first() else None
    axis, size = _pieces(leaf)
    assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    for start in _starts(leaf.shape[axis], size):
        piece = _piece(leaf, np.int32(start), axis=axis, size=size, sharding=everywhere)
        jax.block_until_ready(piece)  # or a process that is ahead would hold many
        if host is not None:
            host[_along(axis, start, size)] = piece.addressable_data(0)
    return host


@functools.partial(jax.jit, static_argnames=("axis", "size", "sharding"))
def _piece(x: jax.Array, start: Any, *, axis: int, size: int, sharding: Any) -> jax.Array:
    piece = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    return jax.lax.with_sharding_constraint(piece, sharding)


def _received(host: np.ndarray | None, leaf: jax.Array) -> np.ndarray:
    """A leaf of process 0 as far as this process needs it; the rest is memory nobody touches."""
    received = np.empty(leaf.shape, leaf.dtype) if host is None else host
    own = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    axis, size = _pieces(leaf)
    for start in _starts(leaf.shape[axis] if leaf.ndim else 1, size):
        at = _along(axis, start, size) if leaf.ndim else (...,)
        shape = received[at].shape
        # As bytes: the sum over processes behind it would turn -0.0 into 0.0.
        sent = np.zeros(math.prod(shape) * leaf.dtype.itemsize, np.uint8)
        sent = sent if host is None else _bytes(host[at])
        got = np.asarray(multihost_utils.broadcast_one_to_all(sent))
        if host is None:
            piece = got.view(leaf.dtype).reshape(shape)
            for index in own:  # whole along `axis`, or there is one piece
                received[at][index] = piece[index]
    return received


def _pieces(leaf: jax.Array) -> tuple[int, int]:
    """Along which axis a leaf is moved in pieces, and how much of it at a time.

    An axis that is not split: of one that is, the compiler would gather the whole.
    """
    part = leaf.sharding.shard_shape(leaf.shape)
    axes = [i for i, n in enumerate(leaf.shape) if n > 1 and part[i] == n]
    if not axes:
        return 0, leaf.shape[0] if leaf.ndim else 1
    row_bytes = leaf.size * leaf.dtype.itemsize // leaf.shape[axes[0]]
    return axes[0], min(max(PIECE_BYTES // max(row_bytes, 1), 1), leaf.shape[axes[0]])


def _starts(length: int, size: int) -> list[int]:
    """Where pieces of one size begin, the last of which overlaps: one program for all of them."""
    return [min(start, length - size) for start in range(0, length, max(size, 1))]


def _along(axis: int, start: int, size: int) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(start, start + size))


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
