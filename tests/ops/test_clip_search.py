"""int4's compiled search against its numpy form: the same bits."""

import ml_dtypes
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.ops import chunks, clip_search
from jaxlora.ops.quantize import quantize


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(clip_search, "_ROWS", 128)
    monkeypatch.setattr(clip_search, "_COLUMNS", 8)
    monkeypatch.setattr(chunks, "_WORTH_COMPILING", 1024)


def both(weight, monkeypatch, **options):
    """The leaf as the compiled program and as numpy makes it."""
    compiled = quantize(weight, "int4", **options)
    with monkeypatch.context() as patch:
        patch.setattr(clip_search, "are_many", lambda *_: False)
        return compiled, quantize(weight, "int4", **options)


def assert_same_bits(one, other):
    np.testing.assert_array_equal(one.values.view(np.uint8), other.values.view(np.uint8))
    np.testing.assert_array_equal(one.scales.view(np.uint16), other.scales.view(np.uint16))


def test_compiled_bits_are_those_of_numpy_on_many_numbers(monkeypatch):
    # A product with a reciprocal in place of the last division changes 3 of these codes.
    weight = np.random.default_rng(0).standard_normal((4096, 4096), np.float32).T * 0.02
    assert_same_bits(*both(weight, monkeypatch))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(
    ("shape", "group"), [((128, 8), 64), ((128, 9), 64), ((192, 20), 64), ((320, 24), 32)]
)
def test_compiled_bits_are_those_of_numpy(shape, group, dtype, small_pieces, monkeypatch):
    limits, rng = ml_dtypes.finfo(dtype), np.random.default_rng(0)
    low, high = np.log10(float(limits.smallest_subnormal)), np.log10(float(limits.max)) - 1
    every = 10 ** np.linspace(low, high, shape[1])
    # About where numpy stores zeros, and where XLA reads them.
    small = 10 ** np.linspace(-39, -36, shape[1])
    for magnitudes in (np.ones(shape[1]), every, small, np.arange(shape[1]) % 8):
        weight = (rng.standard_normal(shape) * magnitudes).astype(dtype)
        assert_same_bits(*both(weight, monkeypatch, group_size=group))


def test_compiled_for_matrices_of_many_groups(small_pieces, monkeypatch):
    seen, program = [], clip_search._program
    monkeypatch.setattr(
        clip_search, "_program", lambda x, clips: seen.append(x.shape) or program(x, clips)
    )
    # Few numbers, inputs or outputs; groups across pieces; a dtype that XLA would narrow.
    for shape in ((64, 8), (64, 64), (512, 4), (120 * 9, 8)):
        quantize(np.ones(shape, np.float32), "int4")
    quantize(np.ones((128, 8)), "int4")
    assert not seen
    quantize(np.ones((128, 8), np.float32), "int4")
    assert seen == [(2, 64, 8)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_compiled_program_lets_no_bad_value_pass(bad, small_pieces):
    weight = np.ones((256, 16), np.float32)
    weight[100, 3] = bad
    with pytest.raises(UserError, match="non-finite"):
        quantize(weight, "int4")
