import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.mixing import interleave

CASES = [
    ([5], None),
    ([10, 10], None),
    ([7, 100], [0.3, 0.7]),
    ([100, 7, 31], [0.5, 0.25, 0.25]),
    ([1000, 1, 20, 400], [8, 0.1, 1, 3]),
    ([3, 3, 3], [1, 1, 1]),
]


def sources(order, counts):
    return np.searchsorted(np.cumsum(counts), order, side="right")


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize(("counts", "weights"), CASES)
def test_shares_are_exact_in_the_whole_and_in_every_prefix(counts, weights, stop, seed):
    order = interleave(counts, weights, stop, seed)
    weights = weights or [1] * len(counts)
    of = sources(order, counts)
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        so_far = np.cumsum(of == source)
        assert abs(so_far[-1] - share * len(order)) < 1
        # Against the whole examples that it has: the rounding of the end is spread over the epoch.
        share = so_far[-1] / len(order)
        bound = 0.5 + share * len(counts) / 2 + 1e-9
        assert np.abs(so_far - share * np.arange(1, len(order) + 1)).max() <= bound


@pytest.mark.parametrize(("counts", "weights"), CASES)
def test_where_an_epoch_ends(counts, weights):
    first = np.bincount(interleave(counts, weights, "first_exhausted", 1), minlength=sum(counts))
    every = np.bincount(interleave(counts, weights, "all_exhausted", 1), minlength=sum(counts))
    assert first.max() == 1, "no example comes twice"
    assert every.min() == 1, "no example is left out"
    of = sources(np.arange(sum(counts)), counts)
    for source, count in enumerate(counts):
        mine = every[of == source]
        assert mine.max() - mine.min() <= 1, "passes begin again only when they are complete"
        assert len(mine) == count


def test_two_data_sets_alternate():
    assert interleave([3, 3]).tolist() == [0, 3, 1, 4, 2, 5]


def test_the_order_is_a_function_of_the_seed():
    def order(seed):
        return interleave([50, 9], None, "all_exhausted", seed).tolist()

    assert order(1) == order(1) != order(2)
    second = [number - 50 for number in order(1) if number >= 50]
    assert second[:9] != second[9:18], "a repeated pass has an order of its own"


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ([3, 3], [1.0], "1 weights for 2 data sets"),
        ([3, 0], None, "no example"),
        ([3, 3], [1, 0], "above 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(counts, weights, message):
    with pytest.raises(UserError, match=message):
        interleave(counts, weights)
