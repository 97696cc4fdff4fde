"""One GPU: tokens/s, MFU and memory of the train step at the shapes of Llama-3-8B and Mistral-7B.

    python benchmarks/gpu.py --output FILE [--seconds 300] [--only llama-3-8b:nf4 ...]
    python benchmarks/gpu.py --table FILE

Random weights, synthetic tokens, rows full. A process for each model and storage of its weights,
in which the cells come from least memory to most: so the process' peak is that of the cell. Every
result is written as soon as it is there, and what does not fit into the time is left out.
GPU_PROFILE=REMAT in the environment adds the kernels of a step, GPU_ATTENTION=NAME sets attention.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CELLS: dict[str, list[tuple[int, int, str]]] = {
    "llama-3-8b:bf16": [
        (4, 2048, "full"), (4, 2048, "attention"), (4, 2048, "matmuls"), (2, 4096, "matmuls"),
    ],
    "llama-3-8b:nf4": [
        (4, 2048, "full"), (4, 2048, "matmuls"), (2, 4096, "matmuls"), (4, 2048, "none"),
    ],
    "llama-3-8b:int8": [(4, 2048, "matmuls")],
    "llama-3-8b:int4": [(4, 2048, "matmuls")],
    "mistral-7b:bf16": [(4, 2048, "matmuls"), (2, 4096, "matmuls")],
    "mistral-7b:nf4": [(4, 2048, "matmuls"), (2, 4096, "matmuls")],
}  # fmt: skip
TEST_CELLS = {"tiny:nf4": [(2, 32, "full"), (2, 32, "matmuls")]}
WARM_UP, GROUPS, GROUP_S = 2, 4, 0.8
# NVIDIA's datasheet, dense bf16.
DATASHEET_FLOPS = {"H100": 989e12, "H200": 989e12}


def batch_of(cfg: Any, rows: int, length: int) -> dict[str, Any]:
    """Returns ``[1, rows, length]`` of random tokens, one full example a row."""
    import jax
    import jax.numpy as jnp

    shape = (1, rows, length)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, cfg.vocab_size, jnp.int32)
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=-1),
        "weights": jnp.ones(shape, jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
    }


def measure(
    subject: Any, rows: int, length: int, remat: str, asked: str = "auto"
) -> dict[str, Any]:
    """Compiles and times one cell; the subject's state goes on from cell to cell."""
    import jax.numpy as jnp

    step, attention = subject.step(remat, asked)
    batch = batch_of(subject.cfg, rows, length)
    number = jnp.int32(0)
    started = time.monotonic()
    lowered = step.lower(subject.trainable, subject.opt_state, subject.frozen, batch, number)
    traced = time.monotonic()
    compiled = lowered.compile()
    ready = time.monotonic()
    before = peak_bytes()

    def turn(steps: int) -> tuple[float, float]:
        start, metrics = time.monotonic(), {}
        for _ in range(steps):
            subject.trainable, subject.opt_state, metrics = compiled(
                subject.trainable, subject.opt_state, subject.frozen, batch, number
            )
        loss = float(metrics["loss"])
        return loss, (time.monotonic() - start) / steps

    first_loss, _ = turn(1)
    _, alone_s = turn(WARM_UP)
    steps = max(1, round(GROUP_S / alone_s))
    turns = [turn(steps) for _ in range(GROUPS)]
    seconds = [each for _, each in turns]
    peak = peak_bytes()
    kernels = profile(lambda: turn(1)) if os.environ.get("GPU_PROFILE") == remat else {}
    return {
        "kernels_ms": kernels,
        "rows": rows,
        "length": length,
        "remat": remat,
        "attention": attention,
        "trace_s": round(traced - started, 2),
        "compile_s": round(ready - traced, 2),
        "steps": steps * GROUPS,
        "step_s": seconds,
        "loss": [first_loss, turns[-1][0]],
        "compiler_bytes": compiler_bytes(compiled),
        # Not known where an earlier cell of the process took more.
        "peak_bytes": peak if peak != before or before is None else None,
        **throughput(subject, rows, length, statistics.median(seconds)),
    }


def profile(run: Any) -> dict[str, float]:
    """Returns the GPU's milliseconds in each kernel of one run, the 40 largest."""
    import collections
    import tempfile

    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    total: dict[str, float] = collections.defaultdict(float)
    for plane in data.planes:
        if "GPU" in plane.name:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        total[event.name] += event.duration_ns / 1e6
    largest = sorted(total.items(), key=lambda item: -item[1])[:40]
    return {name[:120]: round(ms, 3) for name, ms in largest}


def throughput(subject: Any, rows: int, length: int, step_s: float) -> dict[str, Any]:
    """Returns tokens/s and model FLOP/s: LoRA's own, and as if every weight had a gradient."""
    import speed

    tokens_per_s = rows * length / step_s
    lora = speed.lora_flops_per_token(subject.cfg, subject.adapter_size, [length])
    matmuls = speed.lora_flops_per_token(subject.cfg, 0, [1]) / 4
    return {
        "tokens_per_s": round(tokens_per_s),
        "flops_per_s": tokens_per_s * lora,
        "flops_per_s_6p": tokens_per_s * (lora + 2 * matmuls),
    }


def compiler_bytes(compiled: Any) -> dict[str, int]:
    """Returns XLA's own account of the device's memory."""
    found = compiled.memory_analysis()
    parts = {
        name: getattr(found, f"{name}_size_in_bytes")
        for name in ("argument", "output", "temp", "alias")
    }
    total = parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]
    return parts | {"total": total}


def peak_bytes() -> int | None:
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def measured_peak_flops() -> float:
    """Returns FLOP/s of the best of ten bfloat16 products of 8192 x 8192 random matrices."""
    import jax
    import jax.numpy as jnp

    size = 8192 if jax.default_backend() == "gpu" else 256
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best_s = float("inf")
    for _ in range(10):
        started = time.monotonic()
        product(x).block_until_ready()
        best_s = min(best_s, time.monotonic() - started)
    return 2 * size**3 / best_s


def worker(case: str, cells: list[tuple[int, int, str]]) -> None:
    """Measures cells one after the other; a JSON line for each."""
    import gpu_model
    import jax

    model, storage = case.split(":")
    started = time.monotonic()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    subject = gpu_model.make_subject(model, storage, dtype)
    made_s = round(time.monotonic() - started, 1)
    peak = measured_peak_flops()
    for rows, length, remat in cells:
        cell: dict[str, Any] = {"model": model, "storage": storage, "made_s": made_s}
        cell |= {"gemm_flops_per_s": peak}
        try:
            cell |= measure(subject, rows, length, remat, os.environ.get("GPU_ATTENTION", "auto"))
        except Exception as error:  # out of memory, for one: the cells before it stand
            cell |= {"rows": rows, "length": length, "remat": remat, "error": str(error)[:600]}
            print(json.dumps(cell), flush=True)
            return
        print(json.dumps(cell), flush=True)


def environment() -> dict[str, Any]:
    """Returns card, versions, commit and command."""
    import machine

    card = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ) if _there("nvidia-smi") else None  # fmt: skip
    return {
        "date": datetime.date.today().isoformat(),
        "card": card.stdout.strip() if card else "no NVIDIA GPU",
        "command": machine.command(),
        "flags": {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_"))},
        **machine.describe(),
    }


def _there(program: str) -> bool:
    return any(Path(place, program).exists() for place in os.environ["PATH"].split(":"))


def run(cases: dict[str, list[tuple[int, int, str]]], seconds: float, output: Path) -> None:
    """Measures case by case until the time is up; `output` is whole after every cell."""
    end = time.monotonic() + seconds
    result: dict[str, Any] = {**environment(), "cells": []}
    for case, cells in cases.items():
        left = end - time.monotonic()
        if left < 20:
            result.setdefault("left_out", []).append(case)
            continue
        command = [sys.executable, __file__, "--worker", case, json.dumps(cells)]
        variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
        said = output.with_suffix(".stderr")
        with (
            said.open("w") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
            ) as process,
        ):
            assert process.stdout is not None
            timer = _killed_after(process, left)
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                result["cells"].append(json.loads(line))
                print(line.strip()[:400], flush=True)
                output.write_text(json.dumps(result, indent=1) + "\n")
            timer.cancel()
        if process.returncode:
            last = " ".join(said.read_text().split())[-600:]
            result.setdefault("broke_off", {})[case] = f"exit status {process.returncode}: {last}"
            print(case, result["broke_off"][case], flush=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def _killed_after(process: subprocess.Popen, seconds: float) -> Any:
    import threading

    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def table(result: dict[str, Any]) -> str:
    """Returns the cells as a table."""
    lines = [
        "| model | base | rows x tokens | remat | tokens/s | MFU (datasheet) | 6P-equivalent |"
        " of measured GEMM | compiler GB | peak GB | compile s |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    sheet = next((v for k, v in DATASHEET_FLOPS.items() if k in result["card"]), None)
    for cell in result["cells"]:
        begin = f"| {cell['model']} | {cell['storage']} | {cell['rows']} x {cell['length']} | "
        begin += f"{cell['remat']} | "
        if "error" in cell:
            lines.append(f"{begin}{' '.join(cell['error'].split())[:80]} |" + " |" * 6)
            continue
        share, share_6p = (
            f"{cell[name] / sheet:.1%}" if sheet else "-"
            for name in ("flops_per_s", "flops_per_s_6p")
        )
        peak = "-" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 1e9:.1f}"
        lines.append(
            f"{begin}{cell['tokens_per_s']:,} | {share} | {share_6p} | "
            f"{cell['flops_per_s'] / cell['gemm_flops_per_s']:.1%} | "
            f"{cell['compiler_bytes']['total'] / 1e9:.1f} | {peak} | {cell['compile_s']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], json.loads(options.worker[1]))
    elif options.table:
        print(table(json.loads(options.table.read_text())))
    else:
        cases = CELLS | TEST_CELLS
        only = options.only or list(CELLS)
        run({name: cases[name] for name in only}, options.seconds, options.output)


if __name__ == "__main__":
    main()
