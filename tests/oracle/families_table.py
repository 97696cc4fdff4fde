"""A pytest plugin that writes docs/families.md of what the family matrix measured.

A row is replaced if all of its cells ran in this session; rows that did not run keep the date, the
versions and the commit of the session they are from. The measurements are in docs/families.json.
"""

import datetime
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from family_cases import CASES
from released_models import RELEASED

from jaxlora.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
DATA, PAGE = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md"
# Classifiers share everything but the head with the family they are of.
CLASSIFIERS = tuple(family for family in FAMILIES if "SequenceClassification" in family)
ROWS = tuple(family for family in FAMILIES if family not in CLASSIFIERS)
COLUMNS = ("logits", "generation", "LoRA gradients", "PEFT round trip", "merge", "nf4", "int4")
_PACKAGES = ("jax", "torch", "transformers", "peft")
_INTRODUCTION = """\
# Families

Written by `make families-table`; do not edit. Each family is compared with transformers and PEFT
in float32 on tiny models with
scaled random weights (logits of standard deviation about 1), one for every switch of its
configuration.

- **logits**: greatest difference from transformers' over all cases, two seeds each; at most 2e-5.
- **generation**: 32 greedy tokens from a left-padded batch equal transformers'; the figure is of
  logits read token by token through the cache.
- **LoRA gradients**: greatest relative difference from PEFT's, adapters on all linear layers; at
  most 1e-4.
- **PEFT round trip**: logit difference of our adapter in PEFT and of PEFT's file here; at most
  2e-5.
- **merge**: logit difference of the merged folder in transformers; at most 2e-5.
- **nf4**, **int4**: logits of the quantized base, as transformers computes them from our
  dequantized weights; at most 2e-5.

`-`: does not apply. `FAILED` and `not run` mean what they say. A row that was measured in another
session than the rest has its own date and commit.
"""
_CLASSIFIERS = """\
Sequence classifiers have logits and gradients of their own in tests/oracle/test_classifiers.py and
are no rows of this table:"""


class Table:
    """Collects the cells of one session.

    Attributes:
      cells: ``{family: {column: {test id: figure | None | "FAILED"}}}``; None does not apply.
    """

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, dict[str, Any]]] = {}
        self.cases: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        told = dict(report.user_properties)
        if "column" not in told or (report.when != "call" and report.passed):
            return
        self.cases.add(f"{told['case']}/{told['column']}")
        column = self.cells.setdefault(told["family"], {}).setdefault(told["column"], {})
        if report.failed or (report.skipped and "inapplicable" not in told):
            column[report.nodeid] = "FAILED"
        else:
            column[report.nodeid] = told.get("figure")

    def pytest_sessionfinish(self) -> None:
        kept = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {}
        rows = {family: kept[family] for family in ROWS if family in kept}
        ran = {family: cells for family, cells in self.cells.items() if self._whole(family)}
        rows |= {family: {**_session(), "cells": _worst(ran[family])} for family in ran}
        rows = {family: rows[family] for family in ROWS if family in rows}
        DATA.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(rows), encoding="utf-8")

    def _whole(self, family: str) -> bool:
        names = [name for name, case in CASES.items() if case.family == family]
        wanted = {f"{name}/{column}" for name in names for column in COLUMNS}
        return wanted <= self.cases


def _worst(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def worst(values: list[Any]) -> Any:
        if "FAILED" in values:
            return "FAILED"
        return max((value for value in values if value is not None), default=None)

    return {column: worst(list(cells[column].values())) for column in COLUMNS}


def _session() -> dict[str, Any]:
    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return done.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--", "jaxlora", "tests/oracle") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def page(rows: dict[str, Any]) -> str:
    """Returns the page of these rows, one for every family."""
    header = ["family", *COLUMNS, "cases", "measured", "released models"]
    lines = [_INTRODUCTION, _line(header), _line(["---"] * len(header))]
    for family in ROWS:
        row = rows.get(family)
        cells = ["not run"] * len(COLUMNS)
        measured = ""
        if row is not None:
            cells = [_cell(row["cells"].get(column)) for column in COLUMNS]
            measured = f"{row['date']} {row['commit']}"
        cases = sum(case.family == family for case in CASES.values())
        models = ", ".join(RELEASED.get(family, ()))
        lines.append(_line([family, *cells, str(cases), measured, models]))
    lines.append(f"\n{_CLASSIFIERS}\n")
    lines += [f"- {family}" for family in CLASSIFIERS]
    versions = sorted({json.dumps(row["versions"]) for row in rows.values()})
    for each in versions:
        named = ", ".join(f"{name} {version}" for name, version in json.loads(each).items())
        lines.append(f"\nMeasured with {named}.")
    return "\n".join(lines) + "\n"


def _cell(figure: Any) -> str:
    return "-" if figure is None else figure if isinstance(figure, str) else f"{figure:.1e}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's processes report to this one
        config.pluginmanager.register(Table())
