"""A program of several processes: what they say to each other, as a JSON line.

python words.py ADDRESS COUNT NUMBER
"""

import json
import sys

import numpy as np

from jaxlora.core import axes
from jaxlora.core.errors import UserError
from jaxlora.parallel import arrays, processes
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement


def message(work):
    try:
        work()
    except UserError as error:
        return str(error)
    return None


def refuse():
    raise UserError("the first has no file.")


def refuse_unless_first():
    with processes.together("block"):
        if not processes.is_first():
            raise UserError("the second has no file.")


def bits(x):
    return np.asarray(x).tobytes().hex()


def move():
    """Arrays of process 0 on all devices and back: whether every part has its bits."""
    arrays.PIECE_BYTES = 100
    placement = Placement(make_mesh({"fsdp": 2}))
    rng = np.random.default_rng(0)
    layouts = {
        "stacked": ((7, 6, 4), (None, axes.EMBED, axes.MLP)),
        "second": ((4, 6), (axes.MLP, axes.EMBED)),
        "one piece": ((6,), (axes.EMBED,)),
        "whole": ((5, 3), (None, None)),
        "number": ((), ()),
        "nothing": ((0, 4), (None, axes.EMBED)),
    }
    # Any bits: numbers that are none, and -0.0.
    hosts = {
        name: rng.integers(0, 256, (*shape, 4), np.uint8).view(np.float32)[..., 0]
        for name, (shape, _) in layouts.items()
    }
    like = {
        name: arrays.place(np.zeros(shape, np.float32), placement.sharding(logical, shape))
        for name, (shape, logical) in layouts.items()
    }
    placed = arrays.spread(hosts if processes.is_first() else None, like)
    parts = [(hosts[name], s) for name, x in placed.items() for s in x.addressable_shards]
    right = all(bits(host[shard.index]) == bits(shard.data) for host, shard in parts)
    split = [name for name, x in placed.items() if not x.is_fully_replicated]
    back = arrays.fetch(placed)
    same = back and [name for name in hosts if bits(back[name]) == bits(hosts[name])]
    return [right, split, same]


address, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
processes.join(address, count, number)
called = []
facts = {"jax": "1", "learning_rate": 1e-3 * (number + 1), "seed": number}
said = {
    "numbers": [processes.count(), processes.number(), processes.is_first()],
    "exchanged": processes.exchange("mine", {"n": number}),
    "first": processes.on_first("file", lambda: called.append(number) or ["a", 1]),
    "called": called,
    "order": processes.first_then_others("cache", lambda: number),
    "highest": processes.highest(10 + number),
    "moved": move(),
    "same": message(lambda: processes.require_same({"jax": "1"})),
    "differs": message(lambda: processes.require_same(facts)),
    "on_first": message(lambda: processes.on_first("bad", refuse)),
}
print(json.dumps(said | {"together": message(refuse_unless_first)}), flush=True)
