"""Memory: what `jaxlora plan` says of 12 runs, beside what their processes really take.

    python benchmarks/plan_accuracy.py [--only NAME ...]

Each run is a fresh process, its weights random. It compiles the train step, notes its resident
set, makes the arrays, trains three steps and notes the highest resident set. What was added in
between is compared with the plan: on a CPU "device memory" is the process's own, and JAX counts
nothing there (`memory_stats` is empty). The compiler's own memory is in neither figure: it is given
back before the first note. Nothing is timed, so a busy machine does not matter.
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 16384,
    "n_embd": 512,
    "n_layer": 8,
    "n_head": 8,
    "n_positions": 1024,
}
MIXTRAL = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
QLORA = {**LORA, "adapter": "qlora"}
# name: config.json, keys of the run
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": (LLAMA, {"micro_batch_size": 2, "sequence_len": 512}),
    "full, remat": (
        LLAMA,
        {"micro_batch_size": 4, "sequence_len": 512, "gradient_checkpointing": True},
    ),
    "full, adafactor": (
        LLAMA,
        {"micro_batch_size": 2, "sequence_len": 512, "optimizer": "adafactor"},
    ),
    "lora": (LLAMA, {**LORA, "micro_batch_size": 4, "sequence_len": 512}),
    "lora, bf16": (LLAMA, {**LORA, "micro_batch_size": 4, "sequence_len": 512, "bf16": True}),
    "lora, remat matmuls": (
        LLAMA,
        {**LORA, "micro_batch_size": 4, "sequence_len": 512, "remat": "matmuls"},
    ),
    "lora, long rows": (
        LLAMA,
        {**LORA, "micro_batch_size": 1, "sequence_len": 4096, "gradient_checkpointing": True},
    ),
    "qlora int4": (
        LLAMA,
        {**QLORA, "quantization": "int4", "micro_batch_size": 4, "sequence_len": 512},
    ),
    "qlora nf4, remat, accumulation": (
        LLAMA,
        {
            **QLORA,
            "load_in_4bit": True,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "sequence_len": 1024,
            "gradient_checkpointing": True,
        },
    ),
    "lora int8, remat attention": (
        LLAMA,
        {
            **LORA,
            "quantization": "int8",
            "remat": "attention",
            "micro_batch_size": 4,
            "sequence_len": 512,
        },
    ),
    "gpt2 lora": (GPT2, {**LORA, "micro_batch_size": 4, "sequence_len": 512}),
    "mixtral lora": (MIXTRAL, {**LORA, "micro_batch_size": 2, "sequence_len": 512}),
}
STEPS = 3


def _write(folder: Path, name: str) -> dict[str, Any]:
    """Writes config.json and returns the keys of a run."""
    model, keys = RUNS[name]
    (folder / "config.json").write_text(json.dumps(model))
    return {
        "base_model": str(folder),
        "datasets": [{"path": "none.jsonl", "type": "completion"}],
        "output_dir": str(folder / "out"),
        "learning_rate": 1e-4,
        "max_steps": STEPS,
        **keys,
    }


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])  # type: ignore[index]


def _given_back() -> int:
    """Resident bytes, once the allocator has returned what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident("VmRSS")


def run(name: str) -> dict[str, Any]:
    """Plans, then trains, in this process; returns both figures."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlora.config.load import load_config
    from jaxlora.planning import compiled, formula
    from jaxlora.planning.hardware import hardware_of
    from jaxlora.planning.program import make_program

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(_write(Path(folder), name))
        program = make_program(config, jax.devices())
    known = {"topology": "cpu", "hardware": hardware_of(jax.devices()[0])}
    planned, _ = compiled.estimate(program, **known)
    by_formula = formula.estimate(program, **known)
    rng = np.random.default_rng(0)

    def array(like: Any) -> Any:
        if jnp.issubdtype(like.dtype, jnp.floating):
            made = 0.02 * np.abs(rng.standard_normal(like.shape, np.float32))  # second moments
        else:
            made = rng.integers(0, 2, like.shape, np.int8)
        # Converted on the device, as the loader does: only so are 4-bit numbers packed.
        return jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(made)

    def arrays(tree: Any) -> Any:
        return jax.block_until_ready(jax.tree.map(array, tree))

    def made() -> list[Any]:
        batch = arrays(program.batch)
        batch["weights"] = jnp.ones_like(batch["weights"])
        return [*map(arrays, (program.trainable, program.opt_state, program.frozen)), batch]

    def train(state: list[Any], steps: int) -> list[float]:
        losses = []
        for number in range(steps):
            *state[:2], metrics = program.step(*state, jnp.int32(number))
            losses.append(float(metrics["loss"]))
        return losses

    train(made(), 1)  # compiles
    before = _given_back()
    state = made()
    held = _given_back() - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    losses = train(state, STEPS)
    assert np.isfinite(losses).all(), losses
    return {
        "planned": planned.memory.total,
        "formula": by_formula.memory.total,
        "measured": _resident("VmHWM") - before,
        "planned_arrays": planned.memory.total - planned.memory.temporaries,
        "measured_arrays": held,
        "compile_s": round(planned.compile_s, 1),
    }


def measure(name: str) -> dict[str, Any]:
    """Returns the figures of a run, from a process of its own."""
    # One arena, large blocks on their own: what is freed is given back, not kept for later.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as programs:  # the plan compiles what the run then reads
        allocator |= {
            "JAX_COMPILATION_CACHE_DIR": programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        process = subprocess.run(
            [sys.executable, __file__, "--run", name],
            env={**os.environ, **allocator, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        raise SystemExit(f"{name}: {process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the figures as Markdown."""
    lines = ["| run | planned MiB | measured MiB | error | formula |", "|---|---|---|---|---|"]
    for name, found in results.items():
        measured = found["measured"]
        errors = [found[kind] / measured - 1 for kind in ("planned", "formula")]
        lines.append(
            f"| {name} | {found['planned'] / 2**20:.0f} | {measured / 2**20:.0f} | "
            f"{errors[0]:+.1%} | {errors[1]:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures every run, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run)))
        return
    results = {}
    for name in options.only:
        results[name] = measure(name)
        print(table({name: results[name]}).splitlines()[-1], flush=True)
        # After each: a run that is broken off has a result too, of what it got to.
        record = {"command": machine.command(), **machine.describe()}
        path = machine.RESULTS / f"{datetime.date.today()}-plan-accuracy.json"
        path.write_text(json.dumps(record | {"runs": results}, indent=1) + "\n")
    print(f"{table(results)}\nwritten: {path}")


if __name__ == "__main__":
    main()
