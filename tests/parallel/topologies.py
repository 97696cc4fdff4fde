"""A program with eight CPU devices: saves states on some of them and restores them on others.

python topologies.py FOLDER: prints ``{"n to m": leaves that changed}`` as JSON.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import ml_dtypes
import numpy as np

from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.core import axes
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement

MESHES = {
    "1": {},
    "2": {"fsdp": 2},
    "2 tensor": {"tensor": 2},
    "4": {"data": 2, "fsdp": 2},
    "4 expert": {"expert": 2, "context": 2},
    "8": {"fsdp": 2, "tensor": 2, "expert": 2},
    "8 fsdp": {"fsdp": 8},
}
LOGICAL = (axes.EXPERT, axes.EMBED, axes.MLP)
DTYPES = (np.float32, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32)


def state_on(placement, seed):
    """Arrays of every dtype and layout, with numbers that survive no arithmetic."""
    rng = np.random.default_rng(seed)

    def put(dtype, logical, shape):
        bits = rng.integers(0, 256, (*shape[:-1], shape[-1] * np.dtype(dtype).itemsize), np.uint8)
        x = bits.view(dtype)
        return jax.device_put(x, placement.sharding(logical, shape))

    tree = {np.dtype(dtype).name: put(dtype, LOGICAL, (4, 16, 8)) for dtype in DTYPES}
    odd = put(np.float32, LOGICAL[1:], (7, 3))
    return {"params": tree, "odd": odd, "count": put(np.int32, (None,), (1,))}


def bits_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def placement_of(name):
    return Placement(make_mesh(MESHES[name], jax.devices()[: int(name.split()[0])]))


results = {}
for saved_on in MESHES:
    state = state_on(placement_of(saved_on), 0)
    folder = os.path.join(sys.argv[1], saved_on)
    with CheckpointStore(folder) as store:
        store.save(1, state, {})
    for restored_on in MESHES:
        target = state_on(placement_of(restored_on), 1)
        restored, _ = CheckpointStore(folder).restore(1, target)
        leaves = zip(bits_of(state), bits_of(restored), bits_of(target), strict=True)
        changed = sum(was != now or was == other for was, now, other in leaves)
        moved = jax.tree.map(lambda x, y: x.sharding != y.sharding, restored, target)
        results[f"{saved_on} to {restored_on}"] = changed + sum(jax.tree.leaves(moved))
print(json.dumps(results))
