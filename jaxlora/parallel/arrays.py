"""Arrays on the devices of all processes, and back on the host of one."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxlora.parallel import processes


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

    Leaf by leaf: beside the result only one leaf is whole at a time.
    """

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                leaf = leaf.addressable_data(0)
            else:
                leaf = multihost_utils.process_allgather(leaf, tiled=True)
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

    def one(host: Any, leaf: jax.Array) -> jax.Array:
        # As bytes: the sum over processes behind it would turn -0.0 into 0.0.
        size = leaf.size * leaf.dtype.itemsize
        sent = np.zeros(size, np.uint8) if host is None else _bytes(host)
        got = np.asarray(multihost_utils.broadcast_one_to_all(sent)) if size else sent
        return place(got.view(leaf.dtype).reshape(leaf.shape), leaf.sharding)

    return jax.tree.unflatten(structure, [one(*pair) for pair in zip(hosts, leaves, strict=True)])


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
