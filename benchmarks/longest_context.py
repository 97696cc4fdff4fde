"""The longest row that trains on one accelerator that is not here, with activations recomputed.

    python benchmarks/longest_context.py --topology h100:1 [--remat full offload] [--start 65536]

Searches `sequence_len` for QLoRA (int4, rank 16, all linear layers, a micro-batch of one row) of
Llama 3.1 8B, as `jaxlora plan --search` does: every figure is the memory of a compiled train step,
and no weights are needed. Needs the compiler of the topology (`pip install "jaxlora[plan]"` for
TPUs, `"jaxlora[cuda]"` for GPUs) and 10 GiB of memory. Nothing is timed, so a busy machine does not
matter. A GPU counts with 95 % of its memory, as XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives a run.
"""

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

MODEL = Path(__file__).parents[1] / "tests" / "planning" / "models" / "llama3.1-8b"
KEYS: dict[str, Any] = {
    "base_model": str(MODEL),
    "datasets": [{"path": "rows.jsonl", "type": "completion"}],
    "output_dir": "out",
    "adapter": "qlora",
    "quantization": "int4",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "micro_batch_size": 1,
    "sample_packing": True,
    "learning_rate": 2e-4,
    "max_steps": 10,
}
STEP = 4096


def search(
    topology_text: str, remat: str, start: int, tries: int, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Returns the longest row that fits, and all that was compiled to find it.

    Args:
      topology_text, remat: what to compile for, and with.
      start, tries: length to begin with, and programs to compile at most.
      keep: given what is known after each of them: one takes minutes.
    """
    from jaxlora.config.load import load_config
    from jaxlora.planning.estimate import Estimate
    from jaxlora.planning.plan import plan
    from jaxlora.planning.search import largest
    from jaxlora.planning.topology import parse

    topology, compiled = parse(topology_text), []

    def measure(keys: dict[str, Any]) -> Estimate:
        made = plan(load_config({**KEYS, "remat": remat, **keys}), topology)
        row = {"sequence_len": made.length, "method": made.method, "fits": made.fits}
        memory = {"total": made.memory.total, "activations": made.memory.activations}
        compiled.append(row | memory | {"host": made.host_bytes})
        print(f"{remat} {compiled[-1]} compiled in {made.compile_s:.0f} s", flush=True)
        keep({"unfinished": True, "compiled": compiled})
        return made

    found = largest(measure, "sequence_len", start, step=STEP, tries=tries)
    memory, limit = found.estimate.memory.total, found.estimate.limit_bytes
    return {"longest": found.value, "total": memory, "limit": limit, "compiled": compiled}


def main() -> None:
    """Searches for each policy, prints a line and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="h100:1")
    parser.add_argument("--remat", nargs="+", default=["full", "offload"])
    parser.add_argument("--start", type=int, default=65536, help="length to begin with")
    parser.add_argument("--tries", type=int, default=6, help="programs to compile at most")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    kind = options.topology.replace(":", "-")
    path = machine.RESULTS / f"{datetime.date.today()}-longest-context-{kind}.json"
    results = json.loads(path.read_text())["policies"] if path.is_file() else {}
    for remat in options.remat:

        def keep(found: dict[str, Any], remat: str = remat) -> None:
            results[remat] = found
            record = {"command": machine.command(), **machine.describe()}
            path.write_text(json.dumps(record | {"policies": results}, indent=1) + "\n")

        keep(search(options.topology, remat, options.start, options.tries, keep))
    for remat, found in results.items():
        print(f"remat: {remat}: {found['longest']:,} tokens, {found['total'] / 2**30:.2f} GiB")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
