"""A program with eight CPU devices: attention over `context`, and what it is alone.

python context_devices.py: prints, of every case of `CASES`, the largest difference of results and
gradients, how large they are, and what crosses the network (kind and bytes), as JSON.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.ops.attention import Visibility, reference_attention
from jaxlora.ops.attention_chunked import chunked_attention
from jaxlora.ops.attention_splash import SplashAttention
from jaxlora.parallel.attention import on_each_device
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.planning.hlo import Module

ROWS, LENGTH, CHANNELS = 4, 32, 8
# Segments cross every border of devices; rows end in padding, but for one.
SEGMENTS = ((9, 1, 14), (32,), (5, 20), (17, 8, 6))
SPLASH = SplashAttention(interpret=True)
# mesh, query and key-value heads, options.
CASES = {
    "key-value heads divide": ({"fsdp": 2, "context": 4}, (8, 4), {}),
    "each is read on two devices": ({"context": 8}, (16, 4), {"sinks": True, "softcap": 2.0}),
    "some are read on two devices": (
        {"data": 2, "context": 4},
        (12, 6),
        {"windows": (None, 6), "kind": 1, "scale": 0.5},
    ),
    "heads are filled up": ({"expert": 2, "context": 4}, (14, 2), {"sinks": True, "causal": False}),
    "fewer heads than devices": ({"context": 8}, (4, 2), {"values": 4}),
    "heads are too few": ({"context": 8}, (3, 1), {"sinks": True}),
    "tensor splits heads too": ({"tensor": 2, "context": 4}, (16, 4), {"sinks": True}),
    "tensor does not divide key-value heads": ({"tensor": 4, "context": 2}, (8, 2), {}),
    "tensor divides no heads": ({"tensor": 4, "context": 2}, (6, 2), {"sinks": True}),
    "a kernel": ({"fsdp": 4, "context": 2}, (4, 2), {"attend": SPLASH, "windows": (16,)}),
}


def visible(windows: tuple[int | None, ...] = (None,), kind=0, causal=True):
    segments, positions = (np.zeros((ROWS, LENGTH), np.int32) for _ in range(2))
    for row, lengths in enumerate(SEGMENTS):
        ends = np.cumsum(lengths)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True), 1):
            segments[row, end - length : end] = number
            positions[row, end - length : end] = np.arange(length)
    at, within = jnp.asarray(positions), jnp.asarray(segments)
    return Visibility(at, at, within, within, jnp.int32(kind), windows, causal, in_place=True)


def program(attend, seen, operands, options):
    """Results of real tokens and gradients, compiled."""

    @jax.jit
    def both(seen, dy, *operands):
        real = (seen.query_segments > 0)[..., None, None]

        def run(q, k, v, sinks):
            return jnp.where(real, attend(q, k, v, seen, sinks=sinks, **options), 0)

        y, back = jax.vjp(run, *operands)
        return y, back(dy)

    return both.lower(seen, *operands).compile()


def compare(sizes, heads, options):
    options = dict(options)
    attend = options.pop("attend", chunked_attention)
    seen = visible(**{k: options.pop(k) for k in ("windows", "kind", "causal") if k in options})
    values, sinks = options.pop("values", CHANNELS), options.pop("sinks", False)
    num_heads, num_kv_heads = heads
    shapes = (num_heads, values), (num_heads, CHANNELS), (num_kv_heads, CHANNELS)
    rng = np.random.default_rng(0)
    operands: list[jax.Array | None] = [
        jnp.asarray(rng.standard_normal((ROWS, LENGTH, *shape)), jnp.float32)
        for shape in (*shapes, (num_kv_heads, values))
    ]
    operands.append(jnp.asarray(rng.standard_normal(num_heads), jnp.float32) if sinks else None)
    wanted = program(reference_attention, seen, operands, options)(seen, *operands)
    placement = Placement(make_mesh(sizes, jax.devices()))

    def put(x):
        logical = ("batch", "sequence", "heads", None)[: x.ndim] if x.ndim > 1 else (None,) * x.ndim
        return jax.device_put(x, placement.sharding(logical, x.shape))

    seen, operands = jax.tree.map(put, (seen, operands))
    compiled = program(on_each_device(attend, placement), seen, operands, options)
    got = compiled(seen, *operands)
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
    return {
        "difference": max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs),
        "smallest": min(float(np.abs(np.asarray(y)).max()) for _, y in pairs),
        "transfers": [
            [c.kind, c.array.dtype, c.times, c.payload_bytes]
            for c in Module(compiled.as_text() or "").collectives()
        ],
    }


if __name__ == "__main__":
    names = sys.argv[1:] or CASES
    print(json.dumps({name: compare(*CASES[name]) for name in names}))
