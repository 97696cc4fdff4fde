"""Learning rates are those of transformers' get_scheduler at every step."""

import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.optim.schedules import SCHEDULES, make_schedule

PEAK, TOTAL = 3e-4, 40
# Ours is computed in float32, theirs in float64: 2**-24 relative, and cos near its zero.
TOLERANCE = 2e-7 * PEAK


def theirs(name, warmup, **specific):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup, TOTAL, specific or None)
    rates = []
    for _ in range(TOTAL):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def ours(name, warmup, **options):
    rate = make_schedule(name, PEAK, total_steps=TOTAL, warmup_steps=warmup, **options)
    return np.array([float(rate(step)) for step in range(TOTAL)])


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_equals_transformers(name, warmup):
    wanted = theirs(name, warmup)
    assert name == "constant" or wanted[0] == (0 if warmup else PEAK)
    assert np.abs(ours(name, warmup) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("warmup", [0, 7])
def test_a_cosine_with_a_floor_equals_transformers(warmup):
    wanted = theirs("cosine_with_min_lr", warmup, min_lr_rate=0.1)
    assert np.abs(ours("cosine", warmup, min_ratio=0.1) - wanted).max() <= TOLERANCE


def test_a_squared_warm_up_is_the_square_of_the_plain_one():
    squared, plain = ours("cosine", 7, quadratic_warmup=True), ours("cosine", 7)
    assert np.abs(squared[:7] - plain[:7] ** 2 / PEAK).max() <= TOLERANCE
    assert np.array_equal(squared[7:], plain[7:])


def test_a_cosine_may_reach_its_floor_early_and_stay():
    rates = ours("cosine", 7, min_ratio=0.1, decay_steps=30)
    shorter = make_schedule("cosine", PEAK, total_steps=30, warmup_steps=7, min_ratio=0.1)
    assert np.array_equal(rates[:30], [float(shorter(step)) for step in range(30)])
    assert np.abs(rates[30:] - 0.1 * PEAK).max() <= TOLERANCE


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_shorter_than_its_warm_up_stays_finite_and_below_the_peak(name):
    rate = make_schedule(name, PEAK, total_steps=3, warmup_steps=5)
    rates = np.array([float(rate(step)) for step in range(5)])
    assert np.all((rates >= 0) & (rates <= PEAK + TOLERANCE))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'cosin' is unknown.*cosine"):
        make_schedule("cosin", PEAK, total_steps=1, warmup_steps=0)
