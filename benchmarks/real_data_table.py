"""Writes the tables of benchmarks/README.md from a result of `real_data.py`.

python benchmarks/real_data_table.py benchmarks/results/2026-11-23-real-data.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- real_data: begin -->\n", "<!-- real_data: end -->\n"

BUSY = (
    ": **a busy machine.** Other programs ran on these cores, so the times are provisional; losses "
    "and their agreement do not depend on it"
)


def write_readme(result: Path) -> None:
    """Replaces what stands between the two marks of the README."""
    head, _, rest = README.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(
        head + BEGIN + render(json.loads(result.read_text()), result.name) + END + tail
    )


def render(result: dict[str, Any], name: str) -> str:
    """Returns the section of one result."""
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    busy = "--allow-busy" in result["command"]
    dirty = " with uncommitted changes" if result["uncommitted_changes"] else ""
    parts = [
        f"### {result['date']}\n\n"
        f"- hardware: {result['hardware']}\n"
        f"- load average before {_load(result['before'])}, after {_load(result['after'])}"
        f"{BUSY if busy else ' (its own)'}\n"
        f"- versions: {versions}\n"
        f"- commit: {result['commit']}{dirty}\n"
        f"- command: `{result['command']}`\n"
        f"- all numbers: [results/{name}](results/{name})\n"
    ]
    for task, values in result["tasks"].items():
        parts.append(_task(task, values))
    return "\n" + "\n".join(parts) + "\n"


def _load(values: dict[str, Any]) -> str:
    return f"{values['load_average'][0]} ({values['idle_share']:.0%} idle)"


def _task(name: str, values: dict[str, Any]) -> str:
    data = values["data"]
    intro = (
        f"**{name}**: {data['train_rows']:,} training examples, {data['held_out_rows']} held out; "
        f"{data['rows_a_step']} a step, mean length {data['mean_length']} tokens, padded to "
        f"{data['padded_length']}.\n"
    )
    speed = values["speed"]
    note = (
        f"{speed['rounds']} turns of {speed['steps_a_turn']} steps each, alternating; tokens are "
        "real ones, padding not counted. MFU: "
        f"{speed['flops_per_token'] / 1e6:.2f} MFLOP a token "
        f"over {speed['measured_peak_gflops']:,} GFLOP/s, the best float32 product of this run.\n"
    )
    tables = (_losses(values["runs"]), _agreement(values["agreement"]), note, _speed(speed))
    return "\n".join((intro, *tables, _ratios(speed)))


def _losses(runs: dict[str, Any]) -> str:
    rows = [
        (run, str(each["steps"]), f"{each['held_out_before']:.4f}", f"{each['held_out_after']:.4f}")
        for run, each in runs.items()
    ]
    return _table(("run", "steps", "held-out loss before", "after"), rows)


def _agreement(agreement: dict[str, Any]) -> str:
    heads = ("difference from PEFT", *(head.replace("_", " ") for head in agreement["lora"]))
    rows = [(method, *(f"{x:.1e}" for x in each.values())) for method, each in agreement.items()]
    return _table(heads, rows)


def _speed(speed: dict[str, Any]) -> str:
    rows = []
    for lane, each in speed["lanes"].items():
        low, high = each["tokens_per_s_range"]
        rows.append(
            (
                lane,
                f"{each['tokens_per_s']:,}",
                f"{low:,} to {high:,}",
                f"{each['cpu_s_per_step']:.3f}",
                f"{each['warm_up_s']:.1f}",
                f"{each['mfu']:.1%}",
            )
        )
    heads = ("learner", "tokens/s (median)", "range", "CPU s a step", "warm-up s", "MFU")
    return _table(heads, rows)


def _ratios(speed: dict[str, Any]) -> str:
    rows = []
    for pair, each in speed["ratio_to_peft"].items():
        low, high = each["range"]
        rows.append((pair, f"{each['median']:.2f}", f"{low:.2f} to {high:.2f}"))
    return _table(("jaxlora / PEFT, round by round", "median", "range"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_readme(Path(sys.argv[1]))
