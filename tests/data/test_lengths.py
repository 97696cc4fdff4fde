import numpy as np
import pytest

from jaxlora.data.lengths import as_text, histogram


@pytest.mark.parametrize("longest", [1, 2, 9, 10, 11, 12, 99, 2048, 123_456])
def test_every_example_is_in_one_bin(longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 500)
    lengths[0] = longest
    found = histogram(lengths)
    assert sum(found.counts) == 500
    assert len(found.counts) <= 12
    for i, count in enumerate(found.counts):
        inside = (lengths >= found.edges[i]) & (lengths < found.edges[i + 1])
        assert count == inside.sum()
    assert found.counts[-1] > 0


def test_bars_are_as_long_as_the_counts():
    text = as_text(histogram(np.array([1, 1, 1, 1, 15, 15, 25]), bins=3))
    assert text.splitlines() == [
        f" 0 to  9 tokens  {'#' * 40} 4",
        f"10 to 19 tokens  {'#' * 20:<40} 2",
        f"20 to 29 tokens  {'#' * 10:<40} 1",
    ]
