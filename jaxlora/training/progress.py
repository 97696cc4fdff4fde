"""What a person sees while a run trains."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    """Returns ``m:ss`` or ``h:mm:ss``.

    >>> duration(75), duration(3675)
    ('1:15', '1:01:15')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Log lines, and on a terminal a live bar below them.

    Args:
      total: steps of the run.
      first: step the run continues from.
      quiet: print nothing.
    """

    def __init__(self, total: int, *, first: int = 0, quiet: bool = False):
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True, force_jupyter=False)
        self._total, self._step = total, first
        self._started: float | None = None
        self._timed_steps = self._timed_tokens = 0
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn(
                "loss {task.fields[loss]}  {task.fields[rate]} tok/s  ETA {task.fields[eta]}"
            ),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=total, completed=first, loss="-", rate="-", eta="-"
        )

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False)

    def advance(self, tokens: int) -> None:
        """Notes a finished step; the first one, which compiles, is left out of the rate."""
        self._step += 1
        if self._started is None:
            self._started = time.monotonic()
            return
        self._timed_steps += 1
        self._timed_tokens += tokens

    def pause(self, seconds: float) -> None:
        """Leaves time spent in evaluation out of the rate."""
        if self._started is not None:
            self._started += seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second so far, padding not counted."""
        if self._started is None or not self._timed_steps:
            return 0.0
        return self._timed_tokens / max(time.monotonic() - self._started, 1e-9)

    @property
    def eta_s(self) -> float:
        """Seconds left at the rate so far."""
        if self._started is None or not self._timed_steps:
            return 0.0
        per_step = (time.monotonic() - self._started) / self._timed_steps
        return per_step * (self._total - self._step)

    def update(self, values: Mapping[str, float], *, log: bool) -> None:
        """Moves the bar and, at a logging step and at the first one, prints the line."""
        rate, eta = "-", "-"
        if self._timed_steps:
            rate, eta = f"{self.tokens_per_s:,.0f}", duration(self.eta_s)
        self._bar.update(
            self._task, completed=self._step, loss=f"{values['loss']:.4f}", rate=rate, eta=eta
        )
        # The first one ends the wait for the compiler.
        if log or not self._timed_steps:
            self.say(
                f"step {self._step}/{self._total}  epoch {values['epoch']:.2f}  "
                f"loss {values['loss']:.4f}  grad {values['grad_norm']:.3f}  "
                f"lr {values['learning_rate']:.2e}  {rate} tok/s  ETA {eta}"
            )
