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
