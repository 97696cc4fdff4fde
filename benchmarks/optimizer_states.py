"""Optimizer states in fewer bits: what they cost in loss, and how many bytes they take.

    python benchmarks/optimizer_states.py [--steps 150] [--seeds 1 2]

The quickstart (QLoRA of the tiny Llama on its facts), each state with each seed: AdamW in float32,
with the gradient's mean in bfloat16 (`mu_dtype: bfloat16`), with both moments in bfloat16 (here
only, to show why it is no option), and with both in 8 bits (`adamw_8bit`). What two seeds differ by
is the measure of what a difference means. Nothing is timed, so a busy machine does not matter.
"""

import argparse
import datetime
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import machine
import optax

from jaxlora.config.load import load_config
from jaxlora.optim import optimizers
from jaxlora.training import loop
from jaxlora.training.state import bytes_on_devices, saved

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yml"
STATES: dict[str, list[str]] = {
    "float32": [],
    "mean in bfloat16": ["--mu_dtype=bfloat16"],
    "both in bfloat16": [],
    "both in 8 bits": ["--optimizer=adamw_8bit"],
}


def both_in_bfloat16(schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype):
    """AdamW whose moments are rounded to bfloat16 between steps; otherwise that of `optimizers`."""
    b1, b2 = betas
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.bfloat16)

    def cast(state: Any, dtype: Any) -> Any:
        return state._replace(nu=jax.tree.map(lambda x: x.astype(dtype), state.nu))

    def init(params: Any) -> Any:
        return cast(adam.init(params), jnp.bfloat16)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, jnp.bfloat16)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
    )


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains one state with one seed; returns its losses and the bytes of its state."""
    sizes: list[int] = []

    def note_size(state: Any) -> Any:
        if not sizes:
            sizes.append(bytes_on_devices(state.opt_state))
        return saved(state)

    swapped = {"adamw": both_in_bfloat16} if name == "both in bfloat16" else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(optimizers.OPTIMIZERS, swapped),
        mock.patch("jaxlora.training.state.saved", note_size),
    ):
        output = Path(folder) / "run"
        keys = [f"--output_dir={output}", f"--max_steps={steps}", f"--seed={seed}"]
        keys += ["--eval_exact_match=false", "--logging_steps=1"]
        result = loop.train(load_config(QUICKSTART, [*keys, *STATES[name]]), quiet=True)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == steps
    last = statistics.fmean(losses[-20:])
    return {"held_out": result.eval_loss, "last_20": last, "bytes": sizes[0], "losses": losses}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns the figures as Markdown; distances are from float32 with the same seed."""
    lines = [
        "| state | bytes | held-out loss, by seed | loss of the last 20 steps, by seed | "
        "mean distance of the curve |",
        "|---|---:|---|---|---|",
    ]
    for name, runs in results.items():
        distances = [
            statistics.fmean(
                abs(a - b)
                for a, b in zip(made["losses"], results["float32"][seed]["losses"], strict=True)
            )
            for seed, made in runs.items()
        ]
        held_out, last = (
            ", ".join(f"{made[key]:.4f}" for made in runs.values())
            for key in ("held_out", "last_20")
        )
        size = next(iter(runs.values()))["bytes"]
        apart = ", ".join(f"{distance:.5f}" for distance in distances)
        lines.append(f"| {name} | {size:,} | {held_out} | {last} | {apart} |")
    return "\n".join(lines)


def main() -> None:
    """Trains all, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in STATES}
    for seed in options.seeds:
        for name in STATES:
            made = results[name][str(seed)] = run(name, seed, options.steps)
            print(name, seed, f"{made['held_out']:.4f}", made["bytes"], flush=True)
    record = {"date": str(datetime.date.today()), "command": machine.command()}
    machine.write("optimizer-states", record | machine.describe() | {"runs": results})
    print(table(results))


if __name__ == "__main__":
    main()
