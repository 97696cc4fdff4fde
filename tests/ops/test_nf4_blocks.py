"""nf4's compiled program against its numpy form, which is held to bitsandbytes in `oracle`."""

import ml_dtypes
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.ops import chunks, nf4_blocks
from jaxlora.ops.quantize import quantize

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(nf4_blocks, "_PIECE", 64)
    monkeypatch.setattr(chunks, "_WORTH_COMPILING", 64 * nf4_blocks.BLOCK)


def numbers(blocks, dtype):
    """Blocks of every magnitude that the dtype has, of zeros, and with numbers on boundaries."""
    rng = np.random.default_rng(0)
    limits = ml_dtypes.finfo(dtype)
    low, high = np.log10(float(limits.smallest_subnormal)), np.log10(float(limits.max)) - 1
    scales = 10 ** np.linspace(low, high, blocks)
    table = rng.standard_normal((blocks, nf4_blocks.BLOCK)) * scales[:, None]
    table[::7] = 0
    table[::5, :15] = nf4_blocks._BOUNDARIES * np.float32(np.abs(table[::5]).max(axis=1)[:, None])
    # A lone large number beside numbers at the small end of the dtype.
    table[3::11] = float(limits.smallest_normal) / 2
    table[3::11, 9] = float(limits.smallest_normal) * 3
    return table.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [64, 65, 128, 1000])
def test_compiled_bits_are_those_of_numpy(blocks, dtype, small_pieces):
    table = numbers(blocks, dtype)
    packed = np.full((blocks, nf4_blocks.BLOCK // 2), 255, np.uint8)
    absmax = np.full(blocks, -1, np.float32)
    nf4_blocks.quantize_many(table, packed, absmax)
    expected = nf4_blocks.quantize_blocks(table.astype(np.float32).reshape(-1))
    np.testing.assert_array_equal(packed.reshape(-1), expected[0])
    np.testing.assert_array_equal(absmax.view(np.uint32), expected[1].view(np.uint32))


def test_compiled_for_many_whole_blocks_that_lie_one_after_the_other(small_pieces, monkeypatch):
    seen, program = [], nf4_blocks._program
    monkeypatch.setattr(nf4_blocks, "_program", lambda x: seen.append(x.shape) or program(x))
    many = np.ones((64, 64), np.float32)
    few, short, wide = many[:63], np.ones((65, 66), np.float32), many.astype(np.float64)
    apart = np.ones((64, 66), np.float32)[:, 1:65]
    for matrix in (few, short, wide, apart, many):
        quantize(matrix.T, "nf4")
    assert seen == [(64, 64)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_compiled_program_lets_no_bad_value_pass(bad, small_pieces):
    weight = np.ones((64, 64), np.float32)
    weight[40, 3] = bad
    with pytest.raises(UserError, match="non-finite"):
        quantize(weight.T, "nf4")
