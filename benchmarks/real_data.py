"""QLoRA (nf4, int4) and LoRA on real data, beside the same runs with transformers + PEFT.

    python benchmarks/real_data.py --data PATH

PATH holds the model `tinystories-656k`, `e2e/e2e-dataset.zip` and
`instructions/alpaca_en_demo.json`. For each data set: held-out loss before and after each method,
the agreement of the loss curves with PEFT's, and tokens/s of both, taken in turns in one process.
Speed is reported only if the losses agree. About ten minutes on two quiet cores. Writes
`benchmarks/results/<date>-real-data.json` and the tables of `benchmarks/README.md`.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np
from peft_peer import Peer
from real_data_table import write_readme
from real_tasks import METHODS, MODEL, RECIPE, TASKS, check_data
from speed import Lane, Ours, lora_flops_per_token, ratio, summary, take_turns

from jaxlora.checkpoints.peft import save_adapter
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.training.loop import train
from jaxlora.training.metrics import METRICS_FILE, read_lines
from jaxlora.training.setup import Plan, make_plan
from jaxlora.training.state import load_weights

RESULTS = Path(__file__).parent / "results"
COMPARED = 20
# torch's threads wait for each other at every operation: on small matrices, or where other programs
# run, all cores can be ten times slower than one. It is measured with both.
THREADS = sorted({1, os.cpu_count() or 1})
# float32 sums in another order differ by about 1e-6 of the loss; Adam's division amplifies it.
# With nf4 the stored bits are equal, so the same bound holds.
TOLERANCE = 1e-3


class Task:
    """One data set: its configurations, its common starting adapter and its results.

    Args:
      keys: of the run, from `real_tasks`.
      work: scratch folder.
      steps: of each run; None for those of its epochs.
    """

    def __init__(self, keys: dict[str, Any], work: Path, steps: int | None):
        self.work = work
        common = {**RECIPE, **keys, "dataset_prepared_path": str(work / "prepared")}
        self.common = common | ({"max_steps": steps} if steps else {})
        self.plans = {method: self.plan(method) for method in METHODS}
        self.start = work / "start"
        plan = self.plans["lora"]
        assert plan.model.lora is not None
        trainable, _ = load_weights(plan.config, plan.model)
        self.adapter_size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        save_adapter(
            self.start,
            trainable["adapter"],
            plan.model.targets,
            plan.model.lora,
            base_name=plan.config.base_model,
        )

    def config(self, method: str, **changes: Any):
        output = {"output_dir": str(self.work / f"out-{method}")}
        return load_config({**self.common, **METHODS[method], **output, **changes})

    def plan(self, method: str, **changes: Any) -> Plan:
        return make_plan(self.config(method, **changes))

    def ours(self, method: str) -> dict[str, Any]:
        """Trains with jaxlora's own program."""
        result = train(self.config(method), quiet=True)
        records = read_lines(result.output_dir / METRICS_FILE)
        return {
            "held_out_before": result.eval_loss_before,
            "held_out_after": result.eval_loss,
            "losses": [record["loss"] for record in records if "loss" in record],
        }

    def theirs(self, method: str) -> dict[str, Any]:
        """Trains with transformers + PEFT, on the same batches in the same order."""
        plan = self.plans[method]
        assert plan.eval_batches is not None
        peer = Peer(plan, self.start, nf4=method == "nf4")
        before = peer.held_out_loss(plan.eval_batches)
        losses = [peer.step(plan.batches.batch(step)) for step in range(plan.total_steps)]
        after = peer.held_out_loss(plan.eval_batches)
        return {"held_out_before": before, "held_out_after": after, "losses": losses}

    def lanes(self) -> dict[str, Lane]:
        """The learners whose speed is compared, each from the common start."""
        lora, nf4 = self.plans["lora"], self.plans["nf4"]
        rows, real = lora.batches.rows, float(lora.batches.table.lengths.mean())
        # As many real tokens a step as the padded batches have.
        packed_rows = max(1, round(rows * real / lora.config.sequence_len))
        packed = self.plan("lora", sample_packing=True, micro_batch_size=packed_rows)
        batch = lora.batches.batch
        lanes = {
            "lora: jaxlora": Lane(Ours(lora).step, batch),
            "lora: jaxlora, packed": Lane(Ours(packed).step, packed.batches.batch),
            "nf4: jaxlora": Lane(Ours(nf4).step, batch),
            "int4: jaxlora": Lane(Ours(self.plans["int4"]).step, batch),
        }
        for threads in THREADS:
            padded = Peer(lora, self.start, trim=False, threads=threads)
            trimmed = Peer(lora, self.start, threads=threads)
            quantized = Peer(nf4, self.start, nf4=True, threads=threads)
            lanes |= {
                f"lora: PEFT, same padding, {threads} threads": Lane(padded.step, batch),
                f"lora: PEFT, {threads} threads": Lane(trimmed.step, batch),
                f"nf4: PEFT, {threads} threads": Lane(quantized.step, batch),
            }
        return lanes


def agreement(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns the differences of two loss curves: first step, first 20, all."""
    apart = np.abs(np.asarray(ours) - np.asarray(theirs))
    return {
        "first_step": float(apart[0]),
        f"first_{COMPARED}_max": float(apart[:COMPARED].max()),
        "all_max": float(apart.max()),
    }


def measure_quality(task: Task, name: str) -> dict[str, Any]:
    """Trains every method on both sides; returns losses and their agreement."""
    runs: dict[str, Any] = {}
    for method in METHODS:
        runs[f"{method}: jaxlora"] = task.ours(method)
        if method != "int4":  # bitsandbytes has no such format
            runs[f"{method}: PEFT"] = task.theirs(method)
    for run, values in runs.items():
        before, after = values["held_out_before"], values["held_out_after"]
        print(f"{name}: {run}: held-out loss {before:.4f} -> {after:.4f}", flush=True)
    agreements = {}
    for method in ("lora", "nf4"):
        ours, theirs = runs[f"{method}: jaxlora"], runs[f"{method}: PEFT"]
        agreements[method] = agreement(ours["losses"], theirs["losses"])
        for when in ("held_out_before", "held_out_after"):
            agreements[method][when] = abs(ours[when] - theirs[when])
        print(f"{name}: {method}: difference from PEFT {agreements[method]}", flush=True)
    for values in runs.values():
        values["steps"] = len(values["losses"])
        values[f"first_{COMPARED}_losses"] = values.pop("losses")[:COMPARED]
    return {"runs": runs, "agreement": agreements}


def measure_speed(task: Task, rounds: int, steps: int) -> dict[str, Any]:
    """Returns tokens/s of every learner; UserError if two that should agree do not."""
    lanes = task.lanes()
    take_turns(lanes, rounds=rounds, steps=steps)
    pairs = {
        "lora, same padding": ("lora: jaxlora", fastest(lanes, "lora: PEFT, same padding")),
        "lora": ("lora: jaxlora", fastest(lanes, "lora: PEFT")),
        "lora, packed": ("lora: jaxlora, packed", fastest(lanes, "lora: PEFT")),
        "nf4": ("nf4: jaxlora", fastest(lanes, "nf4: PEFT")),
    }
    for label, (ours, theirs) in pairs.items():
        first = agreement(lanes[ours].losses, lanes[theirs].losses)["first_step"]
        if label != "lora, packed" and first > TOLERANCE:  # packed batches are other batches
            raise UserError(f"{label}: losses of step 0 differ by {first:.2g}: no speed reported.")
    plan, peak = task.plans["lora"], machine.measured_peak_flops()
    lengths = plan.batches.table.lengths.tolist()
    flops = lora_flops_per_token(plan.model.cfg, task.adapter_size, lengths)
    return {
        "rounds": rounds,
        "steps_a_turn": steps,
        "flops_per_token": round(flops),
        "measured_peak_gflops": round(peak / 1e9, 1),
        "lanes": {label: summary(lane, flops, peak) for label, lane in lanes.items()},
        "ratio_to_peft": {
            f"{label} ({b})": ratio(lanes[a], lanes[b]) for label, (a, b) in pairs.items()
        },
    }


def fastest(lanes: dict[str, Lane], learner: str) -> str:
    """Returns the lane of a learner with the thread count that suits it best."""
    candidates = [f"{learner}, {threads} threads" for threads in THREADS]
    return max(candidates, key=lambda label: statistics.median(lanes[label].tokens_per_s))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns everything about one data set."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        keys = TASKS[name](arguments.data, work) | {"base_model": str(arguments.data / MODEL)}
        task = Task(keys, work, arguments.steps)
        batches, held_out = task.plans["lora"].batches, task.plans["lora"].data.evaluation
        quality = measure_quality(task, name)
        for method, values in quality["agreement"].items():
            if values[f"first_{COMPARED}_max"] > TOLERANCE:
                raise UserError(f"{name}: {method}: the loss curves differ from PEFT's: {values}")
        facts = {
            "train_rows": len(batches.table),
            "held_out_rows": len(held_out) if held_out is not None else 0,
            "rows_a_step": batches.rows,
            "padded_length": batches.length,
            "mean_length": round(float(batches.table.lengths.mean()), 1),
        }
        speed = measure_speed(task, arguments.rounds, arguments.turn)
        recipe = {**RECIPE, "num_epochs": keys["num_epochs"], "max_steps": arguments.steps}
        return {"data": facts, "recipe": recipe, **quality, "speed": speed}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the real inputs")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, help="steps of each run (default: its epochs)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each learner")
    parser.add_argument("--turn", type=int, default=10, help="steps in a turn")
    parser.add_argument("--allow-busy", action="store_true", help="measure on a busy machine")
    today = datetime.date.today().isoformat()
    parser.add_argument("--output", type=Path, default=RESULTS / f"{today}-real-data.json")
    parser.add_argument("--no-readme", action="store_true", help="leave the tables as they are")
    return parser.parse_args(argv)


def main() -> None:
    """Measures, writes the result and the tables."""
    arguments = parse()
    jax.config.update("jax_platforms", "cpu")  # the other side runs on the CPU
    check_data(arguments.data)
    machine.check_quiet(arguments.allow_busy)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": machine.command(arguments.data),
        **machine.describe(),
        "before": machine.load_now(),
        "tasks": {name: measure(name, arguments) for name in arguments.tasks},
        "after": machine.load_now(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if not arguments.no_readme:
        write_readme(arguments.output)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
