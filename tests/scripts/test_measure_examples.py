"""Configurations in the style of Axolotl's examples: which run as they are, and what blocks others.

The first line of each file says what is expected of it.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts are programs, not a package

import measure_examples  # noqa: E402

EXAMPLES = ROOT / "tests" / "config" / "examples"
OUTCOMES = measure_examples.measure(EXAMPLES)


def test_every_file_is_measured():
    assert [outcome.path.name for outcome in OUTCOMES] == sorted(
        path.name for path in EXAMPLES.iterdir()
    )
    assert {outcome.kind for outcome in OUTCOMES} == {
        "text",
        "preference",
        "reward model",
        "images and sound",
    }


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome.path.name)
def test_file_runs_or_names_exactly_the_keys_that_block_it(outcome):
    first = outcome.path.read_text().splitlines()[0]
    blocked = ", ".join(outcome.blocked_by)
    assert first == (f"# Blocked by: {blocked}" if blocked else "# Runs as it is.")


def test_table_counts_by_kind_and_by_key():
    lines = measure_examples.table(OUTCOMES).splitlines()
    assert lines[0].startswith("text: 13 of 15 run as they are (87%)")
    assert "preference: 0 of 3 run as they are (0%)" in lines
    assert "   3 blocked by rl" in lines


def test_other_yaml_is_passed_over_and_what_is_none_is_said(tmp_path):
    (tmp_path / "zero3.yaml").write_text("stage: 3\n")
    (tmp_path / "bad.yml").write_text("a: [1\n")
    (outcome,) = measure_examples.measure(tmp_path)
    assert outcome.kind == "unreadable"
    assert "bad.yml" in outcome.blocked_by[0]
