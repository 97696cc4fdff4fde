"""How fast matrices are quantized on the CPU, nf4 beside bitsandbytes.

    python benchmarks/quantize.py [--size 4096] [--rounds 7] [--allow-busy]

Both sides quantize the same matrix in one process, in turns; nothing is reported unless their bytes
are equal. bitsandbytes is timed with one thread and with all, and the better of the two counts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import ml_dtypes
import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit

from jaxlora.core.errors import UserError
from jaxlora.ops.quantize import quantize

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
ALONE = ("int4", "int8")


def measure(size: int, rounds: int) -> dict[str, Any]:
    """Returns what was measured for every dtype.

    Raises:
      UserError: the two sides do not give the same bytes.
    """
    numbers = np.random.default_rng(0).standard_normal((size, size), np.float32) * 0.02
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        weight = numbers.astype(dtype)
        tensor = torch.from_numpy(numbers).to(getattr(torch, name))
        check_equal(weight, tensor)
        ways: dict[str, Callable[[], Any]] = {
            "jaxlora": lambda weight=weight: quantize(weight.T, "nf4"),
            **{
                f"bitsandbytes, {threads} threads": lambda tensor=tensor, threads=threads: theirs(
                    tensor, threads
                )
                for threads in sorted({1, os.cpu_count() or 1})
            },
        }
        ways |= {kind: lambda w=weight, kind=kind: quantize(w.T, kind) for kind in ALONE}
        found[name] = compare(ways, rounds)
    return found


def theirs(tensor: torch.Tensor, threads: int) -> Any:
    """bitsandbytes' nf4 with double quantization."""
    torch.set_num_threads(threads)
    return quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)


def check_equal(weight: np.ndarray, tensor: torch.Tensor) -> None:
    """Compares all codes and block scales, without the second quantization of these.

    Raises:
      UserError: they differ.
    """
    ours = quantize(weight.T, "nf4", double_quant=False)
    codes, state = quantize_4bit(tensor, quant_type="nf4", compress_statistics=False)
    scales = np.asarray(ours.scales)
    same = np.array_equal(ours.values.reshape(-1), codes.numpy().reshape(-1))
    if not (same and np.array_equal(scales.reshape(-1), state.absmax.numpy().reshape(-1))):
        raise UserError("nf4: the bytes are not bitsandbytes': no speed given.")


def compare(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Returns seconds of every way, in turns, and how many times as fast the first is."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter(), time.process_time()
            way()
            if number:  # the first round warms up
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.process_time() - started[1])
    median = {name: statistics.median(each) for name, each in wall.items()}
    best = min((n for n in ways if n.startswith("bitsandbytes")), key=lambda name: median[name])
    ratios = [b / a for a, b in zip(wall["jaxlora"], wall[best], strict=True)]
    return {
        "wall_s": median,
        "cpu_s": {name: statistics.median(each) for name, each in cpu.items()},
        "best_peer": best,
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result as a table."""
    size = result["size"]
    lines = [
        "| weight | way | milliseconds | CPU milliseconds | million weights/s |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for dtype, found in result["dtypes"].items():
        for name, wall in found["wall_s"].items():
            way = "jaxlora nf4" if name == "jaxlora" else name
            way = f"jaxlora {name}" if name in ALONE else way
            lines.append(
                f"| {dtype} | {way} | {1e3 * wall:.0f} | {1e3 * found['cpu_s'][name]:.0f} | "
                f"{size * size / wall / 1e6:,.0f} |"
            )
    told = [
        f"{dtype} {found['ratio']:.1f} ({found['range'][0]:.1f} to {found['range'][1]:.1f})"
        for dtype, found in result["dtypes"].items()
    ]
    return "\n".join(
        [*lines, "", f"Times as fast as bitsandbytes, pair by pair: {', '.join(told)}."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)

    def found(options: argparse.Namespace) -> dict[str, Any]:
        return {"size": options.size, "dtypes": measure(options.size, options.rounds)}

    machine.run("quantize", parser, found, table)


if __name__ == "__main__":
    main()
