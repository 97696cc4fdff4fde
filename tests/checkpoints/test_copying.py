"""Large copies give numpy's bits, whichever way they take."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlora.checkpoints import copying

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64}
# One piece and several, along either axis, with a rest; without elements; with a leading axis.
SHAPES = [(5, 7), (300, 900), (900, 301), (2, 130, 70), (1, 64), (0, 4), (3,)]
PAIRS = [*itertools.product(DTYPES, ("bf16", "f32"))]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(copying, "_PIECE", 1 << 12)


@pytest.mark.parametrize(("stored", "wanted"), PAIRS, ids="-".join)
@pytest.mark.parametrize("turned", [False, True])
def test_a_copy_is_numpys(stored, wanted, turned):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        source = (5 * rng.standard_normal(shape)).astype(DTYPES[stored])
        if turned and source.ndim > 1:
            order = np.ascontiguousarray(np.swapaxes(source, -1, -2))
            source = np.swapaxes(order, -1, -2)
        target = np.full(shape, 3, DTYPES[wanted])
        copying.copy(target, source)
        assert target.tobytes() == source.astype(DTYPES[wanted]).tobytes()


def test_a_matrix_is_turned_round_where_there_is_no_cpu_device(monkeypatch):
    monkeypatch.setattr(copying, "host_device", lambda: None)
    source = np.arange(6000, dtype=np.float32).reshape(60, 100)
    target = np.empty((100, 60), np.float32)
    copying.copy(target, source.T)
    assert np.array_equal(target, source.T)


def test_special_numbers_survive_widening():
    source = np.array([[np.inf, -np.inf], [-0.0, 1e-40]], ml_dtypes.bfloat16)
    target = np.empty((2, 2), np.float32)
    copying.copy(target, source)
    assert target.tobytes() == source.astype(np.float32).tobytes()


def test_a_buffer_becomes_a_cpu_array_without_a_copy():
    buffer = copying.aligned((33, 7), np.dtype(np.float32))
    placed = jax.device_put(buffer, may_alias=True)
    assert placed.unsafe_buffer_pointer() == buffer.ctypes.data
