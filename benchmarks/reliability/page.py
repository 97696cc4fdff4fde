"""The table of docs/reliability.md, and the file it comes from."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from outcome import Outcome

sys.path.append(str(Path(__file__).parents[1]))
from machine import RESULTS, describe, load_now

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_START, _END = "<!-- trials -->\n", "<!-- end of trials -->\n"


def write_results(
    outcomes: list[Outcome], *, seed: int, starts: int, seconds: float, command: str
) -> Path:
    """Writes everything into ``benchmarks/results/DATE-reliability.json``."""
    today = datetime.datetime.now(datetime.UTC).date()
    content = {
        "date": str(today),
        "command": command,
        "seed": seed,
        "seconds": round(seconds),
        "runs_started": starts,
        **describe(),
        **load_now(),
        "laws": [
            {
                "law": each.law,
                "good": each.good,
                "trials": each.trials,
                "detail": each.detail,
                "failures": each.failures,
            }
            for each in outcomes
        ],
    }
    path = RESULTS / f"{today}-reliability.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_page(path: Path) -> None:
    """Puts the table of a result file into the page, between its marks."""
    text, found = PAGE.read_text(), json.loads(path.read_text())
    before, rest = text.split(_START)
    PAGE.write_text(before + _START + table(found, path.name) + _END + rest.split(_END)[1])


def table(found: dict[str, Any], name: str) -> str:
    """The laws of a result file in Markdown."""
    versions = found["versions"]
    rows = [
        f"| {each['law']} | {each['good']} of {each['trials']} | {each['detail']} |"
        for each in found["laws"]
    ]
    return "\n".join(
        [
            f"`{found['command']}` on {found['date']}, commit {found['commit']}, seed "
            f"{found['seed']}, {found['runs_started']} starts of a run in {found['seconds']} s;",
            f"{found['hardware']}, jax {versions['jax']}, Python {versions['python']}; from "
            f"[{name}](../benchmarks/results/{name}).",
            "",
            "| law | held | trials |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
