"""Attention of one layer on a CPU, forward and backward: in chunks beside all scores at once.

    python benchmarks/attention.py [--rounds 8] [--allow-busy]

CPU milliseconds of the best turn, in turns (A B A B ...), and the seconds that compiling took.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from jaxlora.ops.attention import Attend, Visibility, reference_attention
from jaxlora.ops.attention_chunked import chunked_attention

# Rows, tokens, heads, channels.
SHAPES = ((16, 64, 6, 48), (4, 256, 6, 48), (4, 256, 12, 64), (2, 512, 6, 48), (1, 1024, 6, 48))
WAYS: dict[str, Attend] = {"at once": reference_attention, "chunks": chunked_attention}
CALLS = 3


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what every shape took in both dtypes."""
    cells = [(dtype, shape) for dtype in ("float32", "bfloat16") for shape in SHAPES]
    return {"cells": [_cell(dtype, shape, options.rounds) for dtype, shape in cells]}


def _cell(dtype: str, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape[:2])
    ones = jnp.ones_like(positions)
    seen = Visibility(positions, positions, ones, ones, in_place=True)

    def program(attend: Attend):
        def both(q, k, v, dy):
            y, back = jax.vjp(lambda q, k, v: attend(q, k, v, seen), q, k, v)
            return y, back(dy)

        started = time.process_time()
        compiled = jax.jit(both).lower(*operands).compile()
        return compiled, time.process_time() - started

    made = {way: program(attend) for way, attend in WAYS.items()}
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for way, (compiled, _) in made.items():
            started = time.process_time()
            for _ in range(CALLS):
                jax.block_until_ready(compiled(*operands))
            best[way] = min(best[way], (time.process_time() - started) / CALLS)
    found = {way: {"cpu_ms": 1e3 * best[way], "compile_cpu_s": made[way][1]} for way in WAYS}
    return {"dtype": dtype, "shape": shape, **found}


def table(result: dict[str, Any]) -> str:
    """Returns the cells as a table."""
    lines = [
        "| rows x tokens, heads of channels | dtype | at once, CPU ms | chunks, CPU ms | times "
        "| compiling, CPU s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for cell in result["cells"]:
        (rows, tokens, heads, channels), once, chunks = cell["shape"], *(cell[way] for way in WAYS)
        lines.append(
            f"| {rows} x {tokens}, {heads} of {channels} | {cell['dtype']} | "
            f"{once['cpu_ms']:.1f} | {chunks['cpu_ms']:.1f} | "
            f"{once['cpu_ms'] / chunks['cpu_ms']:.1f} | "
            f"{once['compile_cpu_s']:.1f}, {chunks['compile_cpu_s']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    machine.run("attention", parser, measure, table)


if __name__ == "__main__":
    main()
