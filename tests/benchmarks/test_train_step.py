"""The benchmark of the train step compares like with like, at a tiny size."""

import pytest
import train_step
from train_step_cells import Cell

from jaxlora.core.errors import UserError

TINY = Cell("tiny", width=32, layers=2, heads=2, hidden=64, rows=2, length=16)


@pytest.mark.oracle
def test_losses_agree_and_speeds_are_compared():
    found = train_step.measure(TINY, rounds=2, turn=1)
    ours, *peers = found["learners"].values()
    assert all(len(each["first_losses"]) == train_step.COMPARED for each in (ours, *peers))
    assert found["ratio"]["tokens_per_s"] > 0
    low, high = found["ratio"]["range"]
    assert low <= found["ratio"]["tokens_per_s"] <= high


@pytest.mark.oracle
def test_no_speed_where_the_losses_differ(monkeypatch):
    monkeypatch.setitem(train_step.TOLERANCE, "float32", -1.0)
    with pytest.raises(UserError, match="no speed given"):
        train_step.measure(TINY, rounds=1, turn=1)


def test_flops_of_a_token_are_four_per_frozen_parameter():
    cell = Cell("15M", 288, 6, 6, 768, 4, 256)
    assert cell.matrix_parameters == 6 * (4 * 288**2 + 3 * 288 * 768) + 32000 * 288
    attention = 6 * 6 * 288 * 256
    expected = 4 * cell.matrix_parameters + attention + 6 * cell.adapter_parameters
    assert cell.describe()["flops_per_token"] == expected


def test_the_readme_has_the_latest_table_and_nothing_else_changes(tmp_path):
    figures = {"tokens_per_s": 2.0, "range": [1.0, 3.0], "cpu_s": 2.5, "peak_rss": 0.5}
    found = {
        "learners": {"jaxlora": {"tokens_per_s": 1000}, "PEFT, 1 thread": {"tokens_per_s": 500}},
        "best_peer": "PEFT, 1 thread",
        "sizes": {"flops_per_token": 10**8, "dtype": "float32"},
        "ratio": figures,
    }
    load = {"load_average": [0.5, 0.5, 0.5]}
    result = {"date": "2026-11-26", "hardware": "a CPU", "versions": {"jax": "1"}, "commit": "c0"}
    result |= {"command": "python x", "load_before": load, "load_after": load}
    result |= {
        "measured_peak_flops": {"float32": 10**12},
        "cells": {"tiny": found | {"commit": "c0"}},
    }
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{train_step.BEGIN}\nold\n{train_step.END}\nbelow\n")
    for _ in range(2):
        train_step.write_readme(result, readme)
    lines = readme.read_text().splitlines()
    row = "| tiny | 1,000 (10%) | 500 (PEFT, 1 thread) | 2.00 (1.00 to 3.00) | 2.50 | 0.50 |"
    assert [lines[0], lines[-1], lines.count(row), "old" in lines] == ["above", "below", 1, False]
