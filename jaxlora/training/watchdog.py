"""Ends a run before its time: a loss that stays high, a held-out loss that falls no more."""

import math
from collections.abc import Sequence


class LossWatchdog:
    """Counts losses in a row above a threshold (Axolotl's loss watchdog).

    >>> watchdog = LossWatchdog(5.0, patience=2)
    >>> [watchdog.barks(loss) for loss in (6.0, 4.0, 6.0, 7.0)]
    [False, False, False, True]

    Args:
      threshold: highest loss that is well; None watches nothing.
      patience: losses in a row, >= 1.
    """

    def __init__(self, threshold: float | None, *, patience: int):
        self.threshold, self.patience = threshold, patience
        self._high = 0

    def barks(self, loss: float | None) -> bool:
        """Takes the loss of the next step; returns whether the run should end.

        None, a step that was left out, is neither high nor well.
        """
        if self.threshold is None or loss is None:
            return False
        self._high = self._high + 1 if loss > self.threshold else 0
        return self._high >= self.patience


def falls_no_more(losses: Sequence[float], patience: int | None) -> bool:
    """Returns whether the last `patience` held-out losses are all no lower than the lowest before.

    As transformers counts; None never gives up. A loss that is not a number is the highest.

    >>> falls_no_more([3.0, 2.0, 2.5, 1.9, 1.9], 2), falls_no_more([3.0, 2.0, 2.0, 2.5], 2)
    (False, True)
    """
    if patience is None or not losses:
        return False
    losses = [math.inf if math.isnan(loss) else loss for loss in losses]
    return len(losses) - 1 - losses.index(min(losses)) >= patience
