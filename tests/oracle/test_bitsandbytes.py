"""nf4 and int8 against bitsandbytes' own CPU code, bit for bit."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlora.ops import chunks, nf4, nf4_blocks
from jaxlora.ops.quantize import dequantize, quantize

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
generic = pytest.importorskip("bitsandbytes.backends.default.ops")

read_back = jax.jit(dequantize, static_argnums=1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [out, in] as Hugging Face stores it: rows of whole blocks; blocks that cross rows; a short last
# block; less than one block; exactly 256 and 257 blocks (one and two nested blocks).
WHOLE = [(64, 256), (1, 64), (256, 64), (257, 64), (24, 1088)]
CROSSING = [(33, 66), (7, 96), (16, 72), (16, 80), (32, 1000)]
SHORT = [(5, 34), (9, 2), (31, 66), (3, 1000), (513, 50)]


def random_weight(shape, *, dtype=torch.float32, scale=1.0, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    weight[::3] = 0  # whole rows, hence whole blocks, of zeros
    return weight.to(dtype)


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same_bits(ours, theirs):
    ours, theirs = np.asarray(ours), as_numpy(theirs)
    assert ours.dtype == theirs.dtype
    unsigned = f"u{ours.dtype.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(ours).view(unsigned), np.ascontiguousarray(theirs).view(unsigned)
    )


def theirs_dequantized(packed, state, dtype):
    """bitsandbytes' reading, by its generic kernel where its AVX-512 one is wrong.

    That kernel starts every row at a fresh scale; where rows are whole vectors of 16 but not whole
    blocks of 64 it reads scales that belong to other blocks (seen in 0.50.2).
    """
    rows, row = state.shape
    if row % 64 and row % 16 == 0:
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        compute = generic._dequantize_4bit_compute.__wrapped__
        return compute(packed.reshape(-1), absmax, state.code, 64, (rows, row), dtype)
    state.dtype = dtype
    return functional.dequantize_4bit(packed, state)


def check_nf4(weight, *, double_quant, read=True):
    """Asserts that the stored bits and what is read back from them equal bitsandbytes'."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    ours = quantize(as_numpy(weight).T, "nf4", double_quant=double_quant)
    assert_same_bits(ours.values.reshape(-1), packed.reshape(-1))
    if double_quant:
        assert_same_bits(ours.scales.offset, state.offset)
        assert_same_bits(ours.scales.absmax, state.state2.absmax)
        assert_same_bits(ours.scales.codes.reshape(-1), state.absmax)
    else:
        assert_same_bits(ours.scales.reshape(-1), state.absmax)
    for dtype in DTYPES if read else []:
        name = str(dtype).removeprefix("torch.")
        theirs = theirs_dequantized(packed, state, dtype)
        assert_same_bits(read_back(ours, name).T, theirs)


def test_tables_equal_bitsandbytes():
    assert_same_bits(nf4.CODEBOOK, functional.get_4bit_type("nf4", device="cpu"))
    assert_same_bits(nf4.DYNAMIC_MAP, functional.create_dynamic_map())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WHOLE + CROSSING + SHORT)
def test_nf4_equals_bitsandbytes(shape, dtype, double_quant):
    check_nf4(random_weight(shape, dtype=dtype), double_quant=double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e-4),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.float16, 1e-7),  # float16 subnormals
        (torch.float16, 1e4),
    ],
)
@pytest.mark.parametrize("shape", [(65, 128), (21, 70)])
def test_nf4_equals_bitsandbytes_at_every_magnitude(shape, dtype, scale, double_quant):
    check_nf4(random_weight(shape, dtype=dtype, scale=scale), double_quant=double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-38, 1e-36, 1e-30, 1e-7, 1, 1e4, 1e30, 1e37])
def test_compiled_nf4_equals_bitsandbytes_at_every_magnitude(dtype, scale, monkeypatch):
    monkeypatch.setattr(nf4_blocks, "_PIECE", 64)
    monkeypatch.setattr(chunks, "_WORTH_COMPILING", 64 * nf4_blocks.BLOCK)
    if torch.tensor(4.5 * scale, dtype=dtype).isinf():
        pytest.skip("beyond the dtype")
    check_nf4(random_weight((75, 128), dtype=dtype, scale=scale), double_quant=False, read=False)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(6, 64), (5, 34)])
def test_nf4_bytes_equal_bitsandbytes_below_normal_float32(shape, double_quant):
    # Only the stored bits: XLA reads subnormal float32 numbers as zero (an error below 1.2e-38).
    for scale in (1e-37, 1e-38, 1e-39, 1e-42):
        weight = random_weight(shape, scale=scale)
        check_nf4(weight, double_quant=double_quant, read=False)
        ours = quantize(weight.numpy().T, "nf4", double_quant=False)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        theirs = theirs_dequantized(packed, state, torch.float32).numpy()
        np.testing.assert_allclose(read_back(ours, "float32").T, theirs, rtol=0, atol=1.2e-38)


@pytest.mark.parametrize("compiled", [False, True])
def test_nf4_ties_equal_bitsandbytes(compiled, monkeypatch):
    if compiled:
        monkeypatch.setattr(nf4_blocks, "_PIECE", 4)
        monkeypatch.setattr(chunks, "_WORTH_COMPILING", 4 * nf4_blocks.BLOCK)
    boundaries = (nf4.CODEBOOK[:-1] + nf4.CODEBOOK[1:]) / np.float32(2)
    near = [np.nextafter(boundaries, np.float32(side), dtype=np.float32) for side in (-2, 2)]
    row = np.concatenate([[1.0], boundaries, *near, np.zeros(18)]).astype(np.float32)
    assert row.size == 64
    # Magnitudes whose reciprocal is exact and one whose is not.
    weight = np.stack([row, row * np.float32(0.25), row * np.float32(3), -row])
    check_nf4(torch.from_numpy(weight), double_quant=False)
    # A short last block is divided by its magnitude, not multiplied by the reciprocal.
    for magnitude in (3, 5, 7, 11, 13):
        short = torch.from_numpy(row[None, :50] * np.float32(magnitude))
        check_nf4(short, double_quant=False, read=False)


def test_nf4_offset_equals_torch_mean_at_every_length():
    # Every remainder of the sum's 8 lanes, 4 in flight and 16-row carries, and longer carries.
    for blocks in [*range(1, 70), 511, 512, 513, 1055, 8191, 8192 + 37, 20011]:
        generator = torch.Generator().manual_seed(blocks)
        magnitudes = torch.rand((blocks, 1), generator=generator) ** 3
        weight = torch.cat([magnitudes, torch.zeros((blocks, 1))], dim=1).repeat(1, 32)
        check_nf4(weight, double_quant=True, read=False)


def test_nf4_double_quantization_equals_bitsandbytes_on_large_matrices():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # from 32768 blocks on torch's own sum depends on their number
    try:
        check_nf4(random_weight((1100, 2048)), double_quant=True, read=False)
        # Above 2**24 blocks (a matrix of 1e9 weights) torch's carries grow longer than 16 rows.
        magnitudes = torch.rand(2**24 + 40005, generator=torch.Generator().manual_seed(0))
        assert_same_bits(nf4._mean(magnitudes.numpy()), magnitudes.mean())
        # Enough scales to come close to every threshold of the dynamic map.
        magnitudes = magnitudes[: 2**21]
        ours = nf4._double_quantize(magnitudes.numpy())
        codes, state = functional.quantize_blockwise(magnitudes - magnitudes.mean(), blocksize=256)
        assert_same_bits(ours.codes, codes)
        assert_same_bits(ours.absmax, state.absmax)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 256), (33, 70), (5, 35)])
def test_int8_equals_llm_int8(shape, dtype):
    weight = random_weight(shape, dtype=dtype)
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    ours = quantize(as_numpy(weight).T, "int8")
    # Rows of zeros: bitsandbytes casts 0 * inf to int8, which C leaves undefined.
    codes[largest == 0] = 0
    assert_same_bits(ours.values.T, codes)
    recovered = (ours.scales[0] * np.float32(127)).astype(np.float16)
    assert_same_bits(recovered, largest.half())
    theirs = functional.int8_vectorwise_dequant(codes, largest).numpy()
    # q * SCB * (1 / 127) against q * (SCB / 127): two float32 roundings each.
    np.testing.assert_allclose(read_back(ours, "float32").T, theirs, rtol=4 * 2.0**-24, atol=0)
