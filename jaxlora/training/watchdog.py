"""Ends a run whose loss has gone up and stays up (Axolotl's loss watchdog)."""


class LossWatchdog:
    """Counts losses in a row above a threshold.

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

    def barks(self, loss: float) -> bool:
        """Takes the loss of the next step; returns whether the run should end."""
        if self.threshold is None:
            return False
        self._high = self._high + 1 if loss > self.threshold else 0
        return self._high >= self.patience
