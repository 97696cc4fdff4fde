"""What a run is doing at the moment, and where its time went."""

import contextlib
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxlora.training.host_memory import release_freed_blocks

# Work of no usual length: downloads, loading, compilation.
UNTIMED = frozenset({"setup", "compile"})
_REMEMBERED = 32


class Phases:
    """A stack of named phases; each second belongs to the innermost one.

    >>> time = iter([0.0, 2.0, 5.0, 6.0])
    >>> phases = Phases(clock=lambda: next(time))
    >>> with phases("step"):
    ...     pass
    >>> phases.seconds()
    {'setup': 3.0, 'step': 3.0}

    Attributes:
      beats: grows with every sign of life.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.beats = 0
        self._clock, self._since = clock, clock()
        self._stack, self._seconds = ["setup"], defaultdict[str, float](float)
        self._lengths = defaultdict[str, deque[float]](lambda: deque(maxlen=_REMEMBERED))

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what happens inside to `name`."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def begin(self, name: str) -> None:
        """Counts to `name`, from now on, what belongs to no other phase."""
        self._charge()
        self._stack[0] = name

    def beat(self) -> None:
        """A sign of life between two parts of a phase, such as batches of an evaluation."""
        self._charge()

    @property
    def current(self) -> str:
        """The innermost phase."""
        return self._stack[-1]

    def usual_s(self, name: str) -> float:
        """Median seconds between two signs of life in that phase so far, 0 before the first."""
        lengths = list(self._lengths[name])
        return statistics.median(lengths) if lengths else 0.0

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, in order of appearance; they sum to those that passed."""
        self._charge()
        return dict(self._seconds)

    def compiling(self, function: Any) -> Callable[..., Any]:
        """The same jitted function; its first call, which compiles, counts as ``compile``."""
        done = False

        def call(*arguments: Any) -> Any:
            nonlocal done
            if done:
                return function(*arguments)
            with self("compile"):
                function.lower(*arguments).compile()  # kept by JAX: the call finds it
                release_freed_blocks()
                result = jax.block_until_ready(function(*arguments))
            done = True
            return result

        return call

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._since
        self._lengths[self._stack[-1]].append(now - self._since)
        self._since = now
        self.beats += 1
