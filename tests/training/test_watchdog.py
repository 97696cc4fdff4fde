"""What ends a run before its time counts only what was measured."""

import math

from jaxlora.training.watchdog import LossWatchdog, falls_no_more


def test_a_step_that_was_left_out_neither_counts_nor_clears_the_count():
    watchdog = LossWatchdog(5.0, patience=2)
    assert [watchdog.barks(loss) for loss in (6.0, None, 7.0)] == [False, False, True]


def test_a_held_out_loss_that_is_no_number_is_the_highest():
    assert not falls_no_more([math.nan, 3.0, 2.0], 2)
    assert falls_no_more([2.0, math.nan, math.nan], 2)
