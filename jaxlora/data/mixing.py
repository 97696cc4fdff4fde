"""In what shares and what order the examples of several data sets make an epoch."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jaxlora.core.errors import UserError

Stop = Literal["first_exhausted", "all_exhausted"]


def interleave(
    counts: Sequence[int],
    weights: Sequence[float] | None = None,
    stop: Stop = "first_exhausted",
    seed: int | None = None,
) -> NDArray[np.int64]:
    """The examples of an epoch by number, data sets mixed evenly from its start to its end.

    Examples are numbered through, the first data set's first. The shares are exact: each data set
    has its part of the epoch's length but for the rounding of the largest remainder, and every
    prefix of n examples has n times the share within one and a half examples, and half the share
    for each data set.

    Args:
        counts: examples of each data set.
        weights: shares, in any unit; None: equal ones.
        stop: whether an epoch ends when one data set has been read whole, or all of them; then
            the others begin again.
        seed: shuffles each pass over a data set; None: in its order.

    Raises:
        UserError: the weights do not fit, or a data set has no example.

    >>> interleave([2, 9], [1, 2]).tolist()
    [2, 0, 3, 4, 1, 5]
    """
    shares = _shares(counts, weights)
    needed = [count / share for count, share in zip(counts, shares, strict=True)]
    total = int(min(needed)) if stop == "first_exhausted" else -int(-max(needed) // 1)
    taken = largest_remainder(total, shares)
    numbers, places = [], []
    for source, (count, first) in enumerate(
        zip(counts, np.cumsum([0, *counts[:-1]]).tolist(), strict=True)
    ):
        numbers.append(first + _passes(count, taken[source], source, seed))
        # The middle of each of `taken` equal parts of the epoch.
        places.append((np.arange(taken[source]) + 0.5) / max(taken[source], 1))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(numbers)[order].astype(np.int64)


def largest_remainder(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers that add up to `total`, each its share of it rounded up or down.

    >>> largest_remainder(10, [Fraction(1, 3)] * 3)
    [4, 3, 3]
    """
    exact = [total * share for share in shares]
    whole = [int(each) for each in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_rest[: total - sum(whole)]:
        whole[i] += 1
    return whole


def _shares(counts: Sequence[int], weights: Sequence[float] | None) -> list[Fraction]:
    if weights is not None and len(weights) != len(counts):
        raise UserError(
            f"mixing_weights: {len(weights)} weights for {len(counts)} data sets; give one each."
        )
    if min(counts) < 1:
        raise UserError(
            "dataset_mixing_strategy: a data set has no example to train on (after val_set_size); "
            "remove it."
        )
    # As they are written: 0.1 is a tenth.
    exact = [Fraction(str(weight)) for weight in weights or [1] * len(counts)]
    if min(exact) <= 0:
        raise UserError("mixing_weights: expected numbers above 0; remove a data set instead.")
    return [each / sum(exact) for each in exact]


def _passes(count: int, taken: int, source: int, seed: int | None) -> NDArray[np.int64]:
    """The first `taken` numbers of passes over `count` examples."""
    passes = []
    for number in range(-(-taken // count)):
        if seed is None:
            passes.append(np.arange(count))
        else:
            passes.append(np.random.default_rng([seed, source, number]).permutation(count))
    return np.concatenate(passes or [np.zeros(0, np.int64)])[:taken]
