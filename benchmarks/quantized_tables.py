"""Embedding and head in 8 bits: what that does to a QLoRA run's held-out loss, and to its bytes.

    python benchmarks/quantized_tables.py --data PATH [--steps N]

PATH holds the model `tinystories-656k` and `instructions/alpaca_en_demo.json`. The same runs on
int4 bases with and without `quantize_embeddings: int8`, each from two seeds: the quickstart (the
embedded tiny Llama) and Alpaca instructions. For each pair: held-out loss before and after, and
how far the losses of their steps come apart at most. What another seed changes stands beside it:
the effect is nothing if it is a small part of that. Nothing is timed, so a busy machine does not
matter; about four minutes on two quiet cores. Writes
`benchmarks/results/<date>-quantized-tables.json`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
from real_tasks import ALPACA, METHODS, MODEL, RECIPE, alpaca

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.training.loop import train
from jaxlora.training.setup import open_model
from jaxlora.training.state import bytes_on_devices, load_weights

ROOT = Path(__file__).parent.parent
SEEDS = (42, 7)
STORED = {"plain": None, "int8": "int8"}


def tasks(data: Path, work: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the keys of each task's runs."""
    assets = ROOT / "jaxlora" / "assets"
    rows = {name: str(assets / "quickstart" / f"{name}.jsonl") for name in ("train", "test")}
    quickstart = {
        "base_model": str(assets / "tiny-llama"),
        "datasets": [{"path": rows["train"], "type": "chat_template"}],
        "test_datasets": [{"path": rows["test"], "type": "chat_template"}],
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "sequence_len": 128,
        "sample_packing": True,
        "micro_batch_size": 16,
        "learning_rate": 4e-3,
        "warmup_ratio": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    instructions = {**RECIPE, **alpaca(data, work), "base_model": str(data / MODEL)}
    common = {**METHODS["int4"], "max_steps": steps, "dataset_prepared_path": str(work / "data")}
    return {"quickstart": quickstart | common, "alpaca": instructions | common}


def run(keys: dict[str, Any], stored: str, seed: int, work: Path) -> dict[str, Any]:
    """Trains once."""
    own = {"quantize_embeddings": STORED[stored], "seed": seed, "output_dir": str(work)}
    config = load_config({**keys, **own})
    _, frozen = load_weights(config, open_model(config))
    result = train(config, quiet=True)
    return {
        "base_bytes": bytes_on_devices(frozen),
        "held_out_before": result.eval_loss_before,
        "held_out_after": result.eval_loss,
        "losses": [line["loss"] for line in result.history if "loss" in line],
    }


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Returns how far two runs' losses are from each other."""
    steps = np.abs(np.subtract(one["losses"], other["losses"]))
    found = {"largest_of_a_step": float(steps.max()), "mean_of_steps": float(steps.mean())}
    for when in ("held_out_before", "held_out_after"):
        found[when] = other[when] - one[when]
    return found


def table(result: dict[str, Any]) -> str:
    """Returns the result as a markdown table."""
    lines = [
        "| task | seed | tables | base, KiB | held out before | after | steps' losses apart: mean "
        "| largest | another seed changes the held-out loss by |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task, runs in result["tasks"].items():
        after = [runs[f"plain, {seed}"]["held_out_after"] for seed in SEEDS]
        for seed in SEEDS:
            for stored in STORED:
                own = runs[f"{stored}, {seed}"]
                differ = apart(runs[f"plain, {seed}"], own)
                ends = ["", "", f"{abs(after[0] - after[1]):.4f}"]
                if stored != "plain":
                    ends[0] = f"{differ['mean_of_steps']:.4f}"
                    ends[1] = f"{differ['largest_of_a_step']:.4f}"
                lines.append(
                    f"| {task} | {seed} | {stored} | {own['base_bytes'] / 1024:,.0f} | "
                    f"{own['held_out_before']:.4f} | {own['held_out_after']:.4f} | "
                    + " | ".join(ends)
                    + " |"
                )
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains every task from every seed, with and without.

    Raises:
      UserError: an input is missing.
    """
    for name in (f"{MODEL}/config.json", ALPACA):
        if not (options.data / name).is_file():
            raise UserError(
                f"--data: {options.data / name} is missing; give the folder of real inputs."
            )
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task, keys in tasks(options.data, Path(folder), options.steps).items():
            runs = found[task] = {}
            for seed in SEEDS:
                for stored in STORED:
                    name = f"{stored}, {seed}"
                    runs[name] = run(keys, stored, seed, Path(folder) / task / name)
                    print(task, name, f"{runs[name]['held_out_after']:.4f}", flush=True)
    return {"steps": options.steps, "tasks": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the model and the data")
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    machine.run("quantized-tables", parser, measure, table, timed=False)


if __name__ == "__main__":
    main()
