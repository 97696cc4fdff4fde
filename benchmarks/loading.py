"""Loading: peak host memory, time beside transformers, and how fast a lying checkpoint is refused.

    python benchmarks/loading.py [--layers 4] [--rounds 5] [--allow-busy]

The same bfloat16 file is loaded as it is, as float32 (what CPUs train in; both sides then make
memory of their own), and quantized. Every measurement is a process of its own, and the two sides
take turns. A load ends when every page of the weights is in the process: transformers maps the
file, so it is made to read one number of every KiB. What either side imports is imported before.
Peaks are measured apart from times, in an allocator that gives back what is freed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import checkpoint_files as files
import machine

from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.core.errors import UserError

# Ours and theirs: plain, and quantized to nf4 (double quantization) while loading.
WAYS = ("bfloat16", "float32", "nf4")
ALONE = ("ours int4", "ours int8")
# glibc's per-thread arenas keep freed memory; a program of one arena shows what is needed.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}

OFFLINE = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

OURS = """
import json, sys, time, jax
import numpy as np
from pathlib import Path
from jaxlora.checkpoints.load import QuantSpec, load_params, read_model_config
from jaxlora.ops.quantize import quantize
folder, way = Path(sys.argv[1]), sys.argv[2]
cfg, _ = read_model_config(folder)
plain = way in ("bfloat16", "float32")
dtype, spec = (way, None) if plain else ("bfloat16", QuantSpec(way))
quantize(np.ones((64, 64), np.float32), "int4")
jax.numpy.zeros(3)
before, started, cpu = peak(), time.monotonic(), time.process_time()
params = jax.block_until_ready(load_params(folder, cfg, dtype=dtype, quantization=spec))
took, cpu = time.monotonic() - started, time.process_time() - cpu
bits = lambda x: 4 if x.dtype == jax.numpy.int4 else 8 * x.dtype.itemsize
held = sum(x.size * bits(x) // 8 for x in jax.tree.leaves(params))
print(json.dumps({"s": took, "cpu_s": cpu, "growth": peak() - before, "held": held}))
"""
THEIRS = """
import json, sys, time, torch, transformers
folder, way = sys.argv[1:]
dtype, options = torch.float32 if way == "float32" else torch.bfloat16, {}
if way == "nf4":
    options["quantization_config"] = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16)
transformers.utils.logging.disable_progress_bar()
if options:
    import bitsandbytes
transformers.LlamaForCausalLM, torch.zeros(3).sum()
before, started, cpu = peak(), time.monotonic(), time.process_time()
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=dtype, local_files_only=True, **options)
took = time.monotonic() - started
touched = sum(float(p.reshape(-1)[::512].float().sum()) for p in model.parameters())
print(json.dumps({"s": time.monotonic() - started, "cpu_s": time.process_time() - cpu,
                  "growth": peak() - before, "held": model.get_memory_footprint(), "call_s": took}))
"""
PEAK = """
def peak():  # resident bytes, mapped file pages included
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) * 1024
"""


def load(folder: Path, case: str, *, peak: bool = False) -> dict:
    """Returns seconds, peak growth and held bytes of one load in a process of its own.

    `peak` measures the growth, at the expense of the time.
    """
    side, way = case.split()
    program = PEAK + (OURS if side == "ours" else THEIRS)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), way],
        capture_output=True,
        text=True,
        env={**os.environ, **(ALLOCATOR if peak else {}), **OFFLINE},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def refusals() -> dict[str, float]:
    """Returns the seconds until each damaged 70B checkpoint is refused."""
    config = files.LLAMA_70B
    whole = files.shapes(config)
    name = "model.layers.79.mlp.down_proj.weight"
    cases = {
        "a tensor that its shard does not hold": {k: v for k, v in whole.items() if k != name},
        "a tensor of another shape": {**whole, name: (8192, 28671)},
    }
    seconds = {}
    for case, stored in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            files.write_headers(Path(folder), config, stored=stored)
            started = time.monotonic()
            try:
                load_params(Path(folder), read_model_config(Path(folder))[0], dtype="bfloat16")
            except UserError as error:
                if name not in str(error):
                    raise
                seconds[case] = round(time.monotonic() - started, 3)
            else:
                raise AssertionError(f"{case}: loaded")
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns everything measured."""
    config = files.LLAMA_1B | {"num_hidden_layers": options.layers}
    cases: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = files.write_random(folder, config)
        for way in WAYS:
            for _ in range(options.rounds):
                for case in (f"ours {way}", f"theirs {way}"):
                    cases.setdefault(case, []).append(load(folder, case))
        for case in ALONE:
            cases[case] = [load(folder, case) for _ in range(options.rounds)]
        peaks = {case: load(folder, case, peak=True)["growth"] for case in cases}
    return {
        "stored": stored,
        "largest_tensor": 2 * max(a * b for a, b in _matrices(config)),
        "cases": cases,
        "peaks": peaks,
        "refusals_s": refusals(),
        "ratios": {way: _ratio(cases[f"ours {way}"], cases[f"theirs {way}"]) for way in WAYS},
    }


def _ratio(ours: list[dict], theirs: list[dict]) -> float:
    return statistics.median(b["s"] / a["s"] for a, b in zip(ours, theirs, strict=True))


def _matrices(config: dict) -> list[tuple[int, ...]]:
    return [shape for shape in files.shapes(config).values() if len(shape) == 2]


def table(result: dict[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    mib = 2**20
    lines = [
        f"- checkpoint: {result['stored'] / mib:,.0f} MiB in bfloat16, largest tensor "
        f"{result['largest_tensor'] / mib:,.0f} MiB",
        "",
        "| load | seconds (median) | CPU seconds | model, MiB | peak growth, MiB "
        "| beyond the model, tensors |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, runs in result["cases"].items():
        peak, held = result["peaks"][case], runs[0]["held"]
        lines.append(
            f"| {case} | {statistics.median(run['s'] for run in runs):.2f} | "
            f"{statistics.median(run['cpu_s'] for run in runs):.2f} | {held / mib:,.0f} | "
            f"{peak / mib:,.0f} | {(peak - held) / result['largest_tensor']:.1f} |"
        )
    ratios = ", ".join(f"{kind} {value:.2f}" for kind, value in result["ratios"].items())
    refused = ", ".join(f"{case} {value:.2f} s" for case, value in result["refusals_s"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"Times as fast as transformers' `from_pretrained`, median of pairs: {ratios}.",
            f"A 70B checkpoint of 30 shards refused: {refused}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="4 layers are 0.6 GB")
    parser.add_argument("--rounds", type=int, default=5)
    machine.run("loading", parser, measure, table)


if __name__ == "__main__":
    main()
