"""A pytest plugin that writes the table of docs/sharding.md of what the layouts' runs measured.

A row that did not run keeps the date and the commit of the session it is from; a row that failed
says so. The measurements are in docs/layouts.json.
"""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from test_devices import ROWS

ROOT = Path(__file__).parents[2]
DATA, PAGE = ROOT / "docs" / "layouts.json", ROOT / "docs" / "sharding.md"
_START, _END = "<!-- layouts -->\n", "<!-- end of layouts -->\n"


class Table:
    """Writes each row when it is done: the whole takes long, and may be stopped."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        told = dict(report.user_properties)
        if "row" not in told or report.when != "call":
            return
        kept = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {}
        row = told.pop("row")
        kept[row] = {**_session(), **told, "held": report.passed}
        rows = {name: kept[name] for name in ROWS if name in kept}
        DATA.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        before, rest = PAGE.read_text(encoding="utf-8").split(_START)
        PAGE.write_text(
            before + _START + table(rows) + _END + rest.split(_END)[1], encoding="utf-8"
        )


def table(rows: dict[str, Any]) -> str:
    """Returns these rows in Markdown."""
    lines = [
        "| what trains | layouts | losses apart | exports apart | CPU s | measured |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        row = rows.get(name)
        cells = ["not run"] * 4
        if row is not None:
            verdict = "" if row["held"] else " FAILED"
            cells = [f"{row['losses']:.1e}{verdict}", f"{row['exports']:.1e}", str(row["cpu_s"])]
            cells.append(f"{row['date']} {row['commit']}")
        lines.append("| " + " | ".join([name, str(len(ROWS[name])), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _session() -> dict[str, str]:
    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return done.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--", "jaxlora") else ""
    commit = git("rev-parse", "--short", "HEAD") + changed
    return {"date": datetime.date.today().isoformat(), "commit": commit}


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's processes report to this one
        config.pluginmanager.register(Table())
