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
    session = _session(seed=seed, starts=starts, seconds=seconds, command=command)
    return _write({**session, "laws": [_law(each) for each in outcomes]})


def replace_rows(
    outcomes: list[Outcome], *, seed: int, starts: int, seconds: float, command: str
) -> Path:
    """Puts laws that were tried again into the last result; each says when that was."""
    content = json.loads(max(RESULTS.glob("*-reliability.json")).read_text())
    again = _session(seed=seed, starts=starts, seconds=seconds, command=command)
    for outcome in outcomes:
        place = [i for i, law in enumerate(content["laws"]) if law["law"] == outcome.law]
        at = place[0] if place else len(content["laws"])
        content["laws"][at : at + 1] = [{**_law(outcome), "again": again}]
    return _write(content)


def _session(*, seed: int, starts: int, seconds: float, command: str) -> dict[str, Any]:
    return {
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "command": command,
        "seed": seed,
        "seconds": round(seconds),
        "runs_started": starts,
        **describe(),
        **load_now(),
    }


def _law(outcome: Outcome) -> dict[str, Any]:
    return {
        "law": outcome.law,
        "good": outcome.good,
        "trials": outcome.trials,
        "detail": outcome.detail,
        "failures": outcome.failures,
    }


def _write(content: dict[str, Any]) -> Path:
    path = RESULTS / f"{content['date']}-reliability.json"
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
        f"| {each['law']} | {each['good']} of {each['trials']} | {each['detail']}{_again(each)} |"
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


def _again(law: dict[str, Any]) -> str:
    """When and by what a row was made that is not of the run of the others."""
    if (run := law.get("again")) is None:
        return ""
    return (
        f"; `{run['command']}` on {run['date']}, commit {run['commit']}, {run['runs_started']} "
        f"starts in {run['seconds']} s"
    )
