"""`--profile`: some steps of a run as a trace for Perfetto and TensorBoard."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

FOLDER = "profile"
_FIRST, _COUNT = 2, 3  # the first step compiles, the second warms up


class StepTrace:
    """Records a few steps once the run is warm.

    Args:
      folder: of the run; the trace comes into its folder ``profile``; None records nothing.
      total: the number of the run's last step, plus one; the first that comes is where it starts.
    """

    def __init__(self, folder: Path | None, total: int):
        self._folder, self._total = folder, total
        self._window: range | None = None
        self._recording = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step."""
        if self._folder is None:
            yield
            return
        if self._window is None:  # a run that continues has fewer steps left
            first = min(number + _FIRST, self._total - 1)
            self._window = range(first, min(first + _COUNT, self._total))
        if number == self._window.start:
            target = self._folder / FOLDER
            jax.profiler.start_trace(str(target), create_perfetto_trace=True)
            self._recording = True
        try:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield
        except BaseException:
            self.close()
            raise
        if number == self._window.stop - 1:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded; safe to call twice."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
