"""Attention over `context`: heads exchanged beside keys and values gathered, memory and work.

    python benchmarks/context.py [--allow-busy]

Memory: the compiler's temporaries of a LoRA step on one row of 8,192 tokens, a device's. Work: CPU
seconds of attention alone, forward and backward, of 8 devices on this machine's cores, the two ways
in turn; they say nothing of links.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
RUN = {
    "datasets": [{"path": "none.jsonl", "type": "completion"}],
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "sequence_len": 8192,
    "micro_batch_size": 1,
    "gradient_checkpointing": True,
    "sample_packing": True,
    "learning_rate": 1e-4,
    "max_steps": 1,
}
DEVICES = (1, 2, 4, 8)
# Query and key-value heads on 8 devices: even, filled up, half of them zeros.
HEADS = ((16, 4), (12, 4), (9, 3), (4, 2))
LENGTH, CHANNELS, TURNS = 2048, 64, 3


def _gather() -> None:
    """From here on keys and values are gathered, as where heads are too few to be exchanged."""
    from jaxlora.parallel import attention

    attention.shares_over_context = lambda *_: None


def temporaries(devices: int, gather: bool) -> float:
    """MiB on each of so many devices."""
    import jax

    from jaxlora.config.load import load_config
    from jaxlora.planning.program import make_program

    if gather:
        _gather()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        mesh = {"context": devices}
        keys: dict[str, Any] = {**RUN, "base_model": folder, "output_dir": folder, "mesh": mesh}
        program = make_program(load_config(keys), jax.devices()[:devices])
    return program.lower().compile().memory_analysis().temp_size_in_bytes / 2**20


def work() -> list[dict[str, Any]]:
    """CPU seconds of both ways, for each of `HEADS`; the least of some turns."""
    import jax
    import jax.numpy as jnp

    from jaxlora.ops.attention import Visibility
    from jaxlora.ops.attention_chunked import chunked_attention
    from jaxlora.parallel import attention
    from jaxlora.parallel.mesh import make_mesh
    from jaxlora.parallel.rules import Placement

    placement = Placement(make_mesh({"context": 8}, jax.devices()))
    positions = jnp.arange(LENGTH)[None]
    seen = Visibility(
        *(positions, positions, jnp.ones_like(positions), jnp.ones_like(positions)), in_place=True
    )
    exchanging, rows = attention.shares_over_context, []
    for heads, kv_heads in HEADS:
        arrays = []
        for number in (heads, kv_heads, kv_heads):
            shape = (1, LENGTH, number, CHANNELS)
            x = jax.random.normal(jax.random.key(number), shape)
            arrays.append(
                jax.device_put(x, placement.sharding((None, "sequence", None, None), shape))
            )
        found: dict[str, list[float]] = {"exchanged": [], "gathered": []}
        steps = {}
        for way in found:
            attention.shares_over_context = exchanging
            if way == "gathered":
                _gather()
            attend = attention.on_each_device(chunked_attention, placement)
            steps[way] = jax.jit(jax.grad(lambda *x, f=attend: f(*x, seen).sum(), (0, 1, 2)))
            jax.block_until_ready(steps[way](*arrays))
        for _ in range(TURNS):
            for way, step in steps.items():
                started = time.process_time()
                jax.block_until_ready(step(*arrays))
                found[way].append(time.process_time() - started)
        rows.append({"heads": heads, "kv_heads": kv_heads} | {w: min(s) for w, s in found.items()})
    return rows


def _child(*words: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--allow-busy", action="store_true")
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(temporaries(int(options.memory[0]), options.memory[1] == "gathered")))
        return
    if options.work:
        print(json.dumps(work()))
        return
    machine.check_quiet(options.allow_busy)
    memory = {
        way: {n: _child("--memory", str(n), way) for n in DEVICES}
        for way in ("exchanged", "gathered")
    }
    for way, sizes in memory.items():
        each = ", ".join(f"{size:.0f} MiB on {n}" for n, size in sizes.items())
        print(f"temporaries of a device, {way}: {each}", flush=True)
    spent = _child("--work")
    for row in spent:
        print(
            f"attention, {row['heads']} heads ({row['kv_heads']} key-value) on 8 devices: "
            f"{row['exchanged']:.2f} CPU s exchanged, {row['gathered']:.2f} gathered "
            f"({row['gathered'] / row['exchanged']:.2f} times)"
        )
    name = f"{datetime.date.today()}-context.json"
    found = {"memory_mib": memory, "work_cpu_s": spent}
    (machine.RESULTS / name).write_text(
        json.dumps({"machine": machine.describe(), "load": machine.load_now(), **found}, indent=1)
    )


if __name__ == "__main__":
    main()
