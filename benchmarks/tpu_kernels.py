"""Cycles of jaxlora's Pallas kernels on a TPU that is not here, by libtpu's instructions.

    python benchmarks/tpu_kernels.py [--chip v6e] [--tokens 2048] [FORMAT ...]

libtpu counts the instructions of a kernel only where it is told to write a profile of them, before
it is first looked for: a process of its own. A kernel's transfers are not in it; `cycles_of` takes
the larger of both. It takes time for each block of the grid, so a product is profiled with a few
and counted as ``start + blocks * (block + steps * step)``.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from jaxlora.planning.topology import environment, parse

if __name__ == "__main__":  # libtpu reads these when JAX first looks for it
    os.environ.update(environment(parse("v5e:1x1"), os.environ))
    folder = tempfile.mkdtemp()
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxlora.ops import nf4, product_tpu
from jaxlora.ops.dequantize_tpu import dequantize
from jaxlora.planning.hlo import Array

# Bytes of memory in a cycle: the bandwidth of the data sheet over the clock, which follows from the
# data sheet's arithmetic (v5e: four units of 128 x 128 at 1.5 GHz, v6e: four of 256 x 256 at 1.75).
CHIPS = {"v5e": 546, "v6e": 937}
SIDE, GROUP, RANK = 1024, nf4.BLOCK, 16
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def measured(chip: str, tokens: int, formats: list[str]) -> dict[str, Any]:
    """Returns what `profile` does, from a process of its own."""
    command = [sys.executable, __file__, "--chip", chip, "--tokens", str(tokens), *formats]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cycles_of(name: str, arrays: list[Array], chip: str, known: dict[str, Any]) -> int:
    """Returns the cycles of one call of a kernel.

    Args:
      name: of the kernel.
      arrays: its result, then its operands.
      chip: key of `CHIPS`.
      known: what `profile` found.
    """
    if "product" not in name:
        elements = arrays[0].size
        return int(max(elements * (2 + 0.5 + 4 / GROUP) / CHIPS[chip], elements * known[name]))
    result, x, codes = arrays[:3]
    tokens = -(-x.shape[0] // known["tokens"])
    blocks, steps = result.shape[1] // SIDE, x.shape[1] // SIDE
    start, block, step, pair = known[name]
    computed = start + tokens * blocks * (block + steps * step + pair * (len(arrays) > 5))
    moved = x.nbytes * blocks + codes.size * (0.5 + 4 / GROUP) * tokens + result.nbytes
    return int(max(computed, moved / CHIPS[chip]))


def profile(chip: str, tokens: int, formats: list[str]) -> dict[str, Any]:
    """Returns cycles by a kernel's name: of an element, or of a product's start, of a block, of a
    step and of the pair in a block; ``tokens`` are those of a block.
    """
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:1x1", chips_per_host_bounds=[1, 1, 1]
    )
    device = SingleDeviceSharding(described.devices[0])

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=device)

    def cycles(f: Any, *arrays: Any) -> int:
        text = jax.jit(f).lower(*arrays).compile().as_text() or ""
        calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
        return sum(int(found) for line in calls for found in CYCLES.findall(line))

    def product(steps: int, blocks: int, kind: Any, table: Any, turned: bool, rank: int) -> int:
        shape = (blocks * SIDE, steps * SIDE) if turned else (steps * SIDE, blocks * SIDE)
        pair = ()
        if rank:
            wide = (blocks * SIDE, rank) if turned else (rank, blocks * SIDE)
            pair = (array((tokens, rank), jnp.bfloat16), array(wide, jnp.bfloat16))
        return cycles(
            lambda x, values, scales, *pair: product_tpu.product(
                x, values, scales, pair or None, table=table, turned=turned
            ),
            array((tokens, steps * SIDE), jnp.bfloat16),
            array(shape, kind),
            array((shape[0] // GROUP, shape[1]), jnp.float32),
            *pair,
        )

    found: dict[str, Any] = {"tokens": tokens}
    for format in formats:
        kind, table = (jnp.int4, None) if format == "int4" else (jnp.uint4, nf4.TABLES[format])
        prefix = "look_up" if table is not None else ""
        read = functools.partial(dequantize, dtype="bfloat16", table=table)
        whole = (4 * SIDE, 4 * SIDE)
        by = array((whole[0] // GROUP, whole[1]), jnp.float32)
        found[prefix or "dequantize"] = cycles(read, array(whole, kind), by) / math.prod(whole)
        for turned in (False, True):
            run = functools.partial(product, kind=kind, table=table, turned=turned)
            least, longer, wider = (run(*grid, rank=0) for grid in ((2, 1), (3, 1), (2, 2)))
            step = longer - least
            block = wider - least - 2 * step
            name = f"{prefix}_product".lstrip("_") + ("_turned" if turned else "")
            found[name] = (least - block - 2 * step, block, step, run(2, 1, rank=RANK) - least)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=["int4", "nf4"])
    parser.add_argument("--chip", choices=CHIPS, default="v6e")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    tokens = min(options.tokens, 2048)
    print(json.dumps(profile(options.chip, tokens, options.formats)))
