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
      steps: how many this process will do.
    """

    def __init__(self, folder: Path | None, steps: int):
        self._folder, self._done = folder, 0
        self._first = min(_FIRST, max(steps - 1, 0))
        self._last = min(self._first + _COUNT, steps) - 1
        self._recording = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step."""
        if self._folder is None:
            yield
            return
        if self._done == self._first:
            target = self._folder / FOLDER
            jax.profiler.start_trace(str(target), create_perfetto_trace=True)
            self._recording = True
        try:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield
        except BaseException:
            self.close()
            raise
        if self._done == self._last:
            self.close()
        self._done += 1

    def close(self) -> None:
        """Writes what has been recorded; safe to call twice."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
