import threading

import numpy as np
import pytest

from jaxlora.ops import chunks


@pytest.mark.parametrize("multiple", [1, 2, 32])
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 1000])
def test_ranges_cover_all_rows_once_and_cut_at_multiples(rows, multiple, monkeypatch):
    for elements in (1, 700, 10**9):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        ranges = chunks.split(rows, 10, multiple)
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
        assert all(start < stop and start % multiple == 0 for start, stop in ranges)


def test_every_range_is_worked_on_without_floating_point_warnings():
    seen, lock = [], threading.Lock()

    def work(start, stop):
        np.zeros(1) / np.zeros(1)
        with lock:
            seen.append((start, stop))

    ranges = [(row, row + 1) for row in range(20)]
    with np.errstate(all="raise"):
        chunks.for_each(work, ranges)
    assert sorted(seen) == ranges


def test_an_error_in_a_range_reaches_the_caller():
    def work(start, stop):
        raise ValueError(start)

    with pytest.raises(ValueError, match="0"):
        chunks.for_each(work, [(0, 1)])
