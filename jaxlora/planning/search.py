"""The largest micro-batch and the longest rows that fit: few compilations each."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxlora.planning.estimate import Estimate

Measure = Callable[[dict[str, Any]], Estimate]
_MOST = 1 << 20


@dataclasses.dataclass(frozen=True)
class Found:
    """The largest value of a key that fits.

    Attributes:
      key: of the configuration.
      value: 0 if not even the smallest fits.
      estimate: of the run with it; of the smallest if that does not fit.
      compiled: how many programs were compiled to find it.
    """

    key: str
    value: int
    estimate: Estimate
    compiled: int


def largest(
    measure: Measure, key: str, start: int, *, step: int = 1, most: int = _MOST, tries: int = 6
) -> Found:
    """Returns the largest multiple of `step` that fits.

    Memory is nearly a straight line in rows and in tokens, so each guess is where the line through
    the two nearest measurements meets the limit; the answer itself has been compiled.

    Args:
      measure: compiles the run with some keys changed.
      key: ``micro_batch_size`` or ``sequence_len``.
      start: where to begin.
      step: what the value is a multiple of.
      most: the largest value to consider.
      tries: how many programs to compile at most.
    """
    seen: dict[int, Estimate] = {}
    guess, low, high = max(start // step, 1), 0, most // step + 1
    while high - low > 1 and len(seen) < tries and guess not in seen:
        seen[guess] = measure({key: guess * step})
        if seen[guess].fits:
            low = max(low, guess)
        else:
            high = min(high, guess)
        guess = min(max(_next(seen, guess), low + 1), high - 1)
    value = low or min(seen)
    return Found(key, low * step, seen[value], len(seen))


def _next(seen: dict[int, Estimate], last: int) -> int:
    """Where the line through the last two measurements meets the limit."""
    limit = seen[last].limit_bytes
    others = sorted((n for n in seen if n != last), key=lambda n: abs(n - last))
    if not others:
        return last * 2 if seen[last].fits else last // 2
    other = others[0]
    slope = (seen[last].memory.total - seen[other].memory.total) / (last - other)
    if slope <= 0:
        return last * 2 if seen[last].fits else last // 2
    return int(last + (limit - seen[last].memory.total) / slope)
