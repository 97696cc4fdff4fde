"""Loading: peak host memory, time beside transformers, and how fast a lying checkpoint is refused.

    python benchmarks/loading.py [--layers 4] [--rounds 5] [--allow-busy]

Every measurement is a process of its own, and the two sides take turns. A load ends when every page
of the weights is in the process: transformers maps the file, so it is made to read one number of
every KiB. What either side imports is imported before. Peaks are measured apart from times, in an
allocator that gives back what is freed.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import checkpoint_files as files
import machine

from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.core.errors import UserError

# Ours and theirs: plain, and quantized to nf4 (double quantization) while loading.
PAIRS = {"bfloat16": ("ours plain", "theirs plain"), "nf4": ("ours nf4", "theirs nf4")}
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
spec = None if way == "plain" else QuantSpec(way)
quantize(np.ones((64, 64), np.float32), "int4")
jax.numpy.zeros(3)
before, started, cpu = peak(), time.monotonic(), time.process_time()
params = jax.block_until_ready(load_params(folder, cfg, dtype="bfloat16", quantization=spec))
took, cpu = time.monotonic() - started, time.process_time() - cpu
bits = lambda x: 4 if x.dtype == jax.numpy.int4 else 8 * x.dtype.itemsize
held = sum(x.size * bits(x) // 8 for x in jax.tree.leaves(params))
print(json.dumps({"s": took, "cpu_s": cpu, "growth": peak() - before, "held": held}))
"""
THEIRS = """
import json, sys, time, torch, transformers
folder, way = sys.argv[1:]
options = {} if way == "plain" else {"quantization_config": transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16)}
transformers.utils.logging.disable_progress_bar()
if options:
    import bitsandbytes
transformers.LlamaForCausalLM, torch.zeros(3).sum()
before, started, cpu = peak(), time.monotonic(), time.process_time()
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, local_files_only=True, **options)
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


def measure(folder: Path, case: str, *, peak: bool = False) -> dict:
    """Returns seconds, peak growth and held bytes of one load in a process of its own.

    `peak` measures the growth, at the expense of the time.
    """
    side, way = case.split()
    program = PEAK + (OURS if side == "ours" else THEIRS)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), way],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            **(ALLOCATOR if peak else {}),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
        },
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


def run(layers: int, rounds: int, allow_busy: bool) -> dict:
    """Returns everything measured."""
    machine.check_quiet(allow_busy)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": machine.command(),
        "machine": machine.describe(),
        "load_before": machine.load_now(),
    }
    config = files.LLAMA_1B | {"num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["stored"] = files.write_random(folder, config)
        result["largest_tensor"] = 2 * max(a * b for a, b in _matrices(config))
        cases: dict[str, list[dict]] = {}
        for pair in PAIRS.values():
            for _ in range(rounds):
                for case in pair:
                    cases.setdefault(case, []).append(measure(folder, case))
        for case in ALONE:
            cases[case] = [measure(folder, case)]
        peaks = {case: measure(folder, case, peak=True)["growth"] for case in cases}
    result |= {
        "cases": cases,
        "peaks": peaks,
        "refusals_s": refusals(),
        "load_after": machine.load_now(),
    }
    result["ratios"] = {
        kind: statistics.median(
            other["s"] / mine["s"] for mine, other in zip(cases[ours], cases[theirs], strict=True)
        )
        for kind, (ours, theirs) in PAIRS.items()
    }
    return result


def _matrices(config: dict) -> list[tuple[int, ...]]:
    return [shape for shape in files.shapes(config).values() if len(shape) == 2]


def table(result: dict) -> str:
    """Returns the result as a Markdown table with its circumstances."""
    mib = 2**20
    busy = min(result["load_before"]["idle_share"], result["load_after"]["idle_share"]) < 0.8
    lines = [
        f"### {result['date']}",
        "",
        f"- hardware: {result['machine']['hardware']}"
        + (" **Busy: other programs ran, times are provisional.**" if busy else ""),
        f"- load average before {result['load_before']['load_average'][0]}, after "
        f"{result['load_after']['load_average'][0]}",
        f"- commit: {result['machine']['commit']}; command: `{result['command'].strip()}`",
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="4 layers are 0.6 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--allow-busy", action="store_true")
    options = parser.parse_args()
    result = run(options.layers, options.rounds, options.allow_busy)
    machine.write("loading", result)
    print(table(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
