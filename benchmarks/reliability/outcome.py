"""What a set of trials has shown."""

import dataclasses
import time


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Attributes:
      law: what was to hold.
      good, trials: in how many of the trials it did.
      detail: where the trials fell, and other figures.
      failures: what the others were, in words.
    """

    law: str
    good: int
    trials: int
    detail: str = ""
    failures: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        return self.good == self.trials > 0


class Progress:
    """Says on one line per trial how far the run of all trials is."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.0f} s] {text}", flush=True)
