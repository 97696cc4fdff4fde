"""The train step on a CPU beside transformers + PEFT at its best setting.

    python benchmarks/train_step.py [--cells NAME ...] [--rounds 4] [--turn 2] [--allow-busy]

Every learner is a process of its own: the same Llama of random weights, the same adapter, the same
rows of full length. They take turns (A B A B ...) and wait for each other; ratios are taken pair by
pair. Nothing is reported unless the first losses agree. Writes
`benchmarks/results/<date>-train-step.json` and the table, also into benchmarks/README.md; cells
that are not measured stay as this day's file has them, each with the commit it was measured at.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from train_step_cells import CELLS, Cell, write_inputs
from train_step_worker import Worker

from jaxlora.core.errors import UserError

COMPARED = 3
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- train_step: begin -->", "<!-- train_step: end -->"
# Losses are about 10: float32 sums in another order, and bfloat16 products of another kernel.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def measure(cell: Cell, rounds: int, turn: int) -> dict[str, Any]:
    """Returns what one cell measured: every learner's figures and ours over the best peer's.

    Raises:
      UserError: the losses of the first steps differ.
    """
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(cell, Path(scratch))
        workers = {name: Worker(name, cell, Path(scratch)) for name in cell.learners}
        try:
            for worker in workers.values():
                worker.turn(COMPARED)  # compiles
            _check_losses(cell, workers)
            for worker in workers.values():
                worker.turns.clear()
            for _ in range(rounds):
                for worker in workers.values():
                    worker.turn(turn)
        finally:
            for worker in workers.values():
                worker.close()
    return _figures(cell, workers)


def _check_losses(cell: Cell, workers: dict[str, Worker]) -> None:
    ours, *theirs = (worker.losses[:COMPARED] for worker in workers.values())
    for name, losses in zip(list(workers)[1:], theirs, strict=True):
        apart = max(abs(a - b) for a, b in zip(ours, losses, strict=True))
        if not apart <= TOLERANCE[cell.dtype]:
            raise UserError(f"{cell.name}: losses of {name} differ by {apart:.2g}: no speed given.")


def _figures(cell: Cell, workers: dict[str, Worker]) -> dict[str, Any]:
    tokens = cell.rows * cell.length
    learners = {
        name: {
            "tokens_per_s": round(statistics.median(tokens / each["wall_s"] for each in w.turns)),
            "range": [
                round(tokens / max(each["wall_s"] for each in w.turns)),
                round(tokens / min(each["wall_s"] for each in w.turns)),
            ],
            "cpu_s_per_step": round(statistics.median(each["cpu_s"] for each in w.turns), 3),
            "first_turn_s": round(w.first_turn_s, 1),
            "peak_rss_mib": round(w.peak_rss_mib),
            "first_losses": w.losses[:COMPARED],
        }
        for name, w in workers.items()
    }
    ours, *peers = learners
    best = max(peers, key=lambda name: learners[name]["tokens_per_s"])
    leanest = min(peers, key=lambda name: learners[name]["peak_rss_mib"])
    pairs = zip(workers[best].turns, workers[ours].turns, strict=True)
    ratios = [b["wall_s"] / a["wall_s"] for b, a in pairs]
    return {
        "sizes": cell.describe(),
        "learners": learners,
        "best_peer": best,
        "ratio": {
            "tokens_per_s": round(statistics.median(ratios), 2),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
            "cpu_s": round(learners[best]["cpu_s_per_step"] / learners[ours]["cpu_s_per_step"], 2),
            "peak_rss": round(
                learners[ours]["peak_rss_mib"] / learners[leanest]["peak_rss_mib"], 2
            ),
        },
    }


def table(result: dict[str, Any]) -> str:
    """Returns the cells as a table."""
    lines = [
        "| cell | jaxlora, tokens/s (MFU) | best peer, tokens/s | ratio, pair by pair "
        "| CPU seconds | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in result["cells"].items():
        ours, best = found["learners"]["jaxlora"], found["learners"][found["best_peer"]]
        low, high = found["ratio"]["range"]
        mfu = ours["tokens_per_s"] * found["sizes"]["flops_per_token"]
        mfu /= result["measured_peak_flops"][found["sizes"]["dtype"]]
        lines.append(
            f"| {name} | {ours['tokens_per_s']:,} ({mfu:.0%}) | {best['tokens_per_s']:,} "
            f"({found['best_peer']}) | {found['ratio']['tokens_per_s']:.2f} ({low:.2f} to "
            f"{high:.2f}) | {found['ratio']['cpu_s']:.2f} | {found['ratio']['peak_rss']:.2f} |"
        )
    return "\n".join(lines)


def write_readme(result: dict[str, Any], readme: Path = README) -> None:
    """Puts the table between the marks in the README of the benchmarks."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    loads = [result[when]["load_average"][0] for when in ("load_before", "load_after")]
    commits = dict.fromkeys(cell["commit"] for cell in result["cells"].values())
    facts = (
        f"- {result['date']}; hardware: {result['hardware']}; load average before {loads[0]}, "
        f"after {loads[1]}",
        f"- versions: {versions}",
        f"- commits: {', '.join(commits)}; last command: `{result['command']}`",
    )
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    lines = "\n".join(facts)
    readme.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{table(result)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=4, help="turns of each learner")
    parser.add_argument("--turn", type=int, default=2, help="steps in a turn")
    parser.add_argument("--allow-busy", action="store_true", help="measure on a busy machine")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    machine.check_quiet(options.allow_busy)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": machine.command(),
        **machine.describe(),
        "load_before": machine.load_now(),
        "measured_peak_flops": {
            dtype: machine.measured_peak_flops(dtype) for dtype in ("float32", "bfloat16")
        },
        "cells": {},
    }
    before = machine.RESULTS / f"{result['date']}-train-step.json"
    if before.exists():
        result["cells"] = json.loads(before.read_text())["cells"]
    for name in options.cells:
        measured = measure(CELLS[name], options.rounds, options.turn)
        result["cells"][name] = measured | {"commit": result["commit"]}
        print(f"{name}: {result['cells'][name]['ratio']}", flush=True)
    result["load_after"] = machine.load_now()
    if not options.no_write:
        machine.write("train-step", result)
        write_readme(result)
    print(table(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
