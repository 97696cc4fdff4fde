import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.core.errors import UserError
from jaxlora.ops import chunks, nf4
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.ops.integer import group_length
from jaxlora.ops.quantize import FORMATS, bits_per_parameter, dequantize, pack, quantize, unpack

read_back = jax.jit(dequantize, static_argnums=1)
# Inputs that 64 divides and that it does not: nf4 blocks and int4 groups then differ in shape.
SHAPES = [(128, 24), (80, 33), (34, 5)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rmse(weight, quantized):
    return float(np.sqrt(np.mean((np.asarray(read_back(quantized)) - weight) ** 2)))


def assert_same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_int4_clip_search_beats_plain_rounding_on_normal_data():
    weight = normal(2048, 256)
    groups = weight.reshape(-1, 64, 256)
    step = np.abs(groups).max(axis=1, keepdims=True) / 7
    plain = float(np.sqrt(np.mean((np.rint(groups / step) * step - groups) ** 2)))
    assert plain > 0.107
    # 0.0908 on half a million numbers, whose sampling error is about 0.0001.
    assert rmse(weight, quantize(weight, "int4")) < 0.0912


def test_nf4_and_int8_errors_on_normal_data():
    weight = normal(2048, 256)
    # Measured 0.0920 and 0.0082; sampling error below 1 %.
    assert rmse(weight, quantize(weight, "nf4")) < 0.0930
    assert rmse(weight, quantize(weight, "int8")) < 0.0083


def test_int4_peak_falls_on_minus_eight_whatever_its_sign():
    steps = np.arange(-7.0, 8.0).repeat(5)[:64].astype(np.float32)
    steps[0] = -8
    weight = np.stack([steps, -steps], axis=1)
    quantized = quantize(weight, "int4")
    np.testing.assert_array_equal(quantized.values.astype(int), np.stack([steps, steps], axis=1))
    np.testing.assert_array_equal(quantized.scales, [[1, -1]])
    np.testing.assert_array_equal(dequantize(quantized), weight)


def test_int4_codes_are_the_nearest_for_the_scale_as_it_is_stored():
    weight = normal(256, 64)
    leaf = quantize(weight, "int4")
    assert leaf.scales.dtype == jnp.bfloat16
    steps = weight.reshape(-1, 64, 64) / leaf.scales.astype(np.float32)[:, None]
    nearest = np.clip(np.rint(steps), -8, 7).reshape(weight.shape)
    # Two roundings apart from here, so that a weight between two steps may fall to either.
    differ = nearest != leaf.values.astype(np.float32)
    assert differ.mean() < 1e-3
    between = np.abs(np.abs(steps - np.floor(steps)) - 0.5).reshape(weight.shape)
    assert between[differ].max(initial=0) < 1e-5


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
def test_numbers_of_bfloat16_scales_are_rounded_once(scattered, zeros):
    leaf = quantize(normal(256, 64), "int4", dtype="bfloat16")
    rng = np.random.default_rng(3)
    parts = {"zeros": rng.integers(-8, 8, leaf.scales.shape).astype(jnp.int4)} if zeros else {}
    groups = np.arange(256) // 64
    if scattered:
        rng.shuffle(groups)
        parts["groups"] = groups.astype(np.int32)
    whole = {name: np.asarray(getattr(leaf, name), np.float32) for name in ("values", "scales")}
    less = parts["zeros"].astype(np.float32)[groups] if zeros else 0
    exact = (whole["values"] - less) * whole["scales"][groups]
    got = jax.jit(dequantize)(dataclasses.replace(leaf, **parts))
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_zero_stays_zero(format, double_quant):
    quantized = quantize(np.zeros((80, 6), np.float32), format, double_quant=double_quant)
    np.testing.assert_array_equal(read_back(quantized), np.zeros((80, 6)))


@pytest.mark.parametrize("format", FORMATS)
def test_zero_output_among_others_stays_zero(format):
    weight = normal(128, 4)
    weight[:, 2] = 0
    out = np.asarray(read_back(quantize(weight, format, double_quant=False)))
    assert not out[:, 2].any()
    assert out[:, 1].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_non_finite_weight_is_refused(format, double_quant, bad, dtype):
    for shape in SHAPES:
        weight = normal(*shape).astype(dtype)
        weight[-1, -1] = bad
        with pytest.raises(UserError, match="non-finite"):
            quantize(weight, format, double_quant=double_quant)


def test_int8_refuses_what_float16_cannot_hold():
    weight = normal(8, 4)
    weight[1, 2] = 1e5
    with pytest.raises(UserError, match="65504"):
        quantize(weight, "int8")


def test_nf4_refuses_odd_inputs():
    with pytest.raises(UserError, match="in=33 is odd"):
        quantize(normal(33, 64), "nf4")


@pytest.mark.parametrize("shape", [(3, 64, 10), (34, 5)])
def test_packed_int4_holds_half_the_bytes_and_the_same_numbers(shape):
    weight = normal(*shape)
    layers = [quantize(layer, "int4") for layer in weight.reshape(-1, *shape[-2:])]
    leaf = jax.tree.map(lambda *parts: np.stack(parts), *layers) if len(shape) > 2 else layers[0]
    packed = pack(leaf)
    assert packed.shape == leaf.shape
    assert packed.values.nbytes * 2 == leaf.values.nbytes
    assert_same_bits(unpack(packed), leaf)
    np.testing.assert_array_equal(read_back(packed), read_back(leaf))
    assert bits_per_parameter(packed) == bits_per_parameter(leaf)


@pytest.mark.parametrize(("format", "shape"), [("int4", (97, 3)), ("nf4", (64, 3))])
def test_what_cannot_be_packed_stays_as_it_is(format, shape):
    leaf = quantize(normal(*shape), format)
    assert pack(leaf) is leaf


@pytest.mark.parametrize(("format", "block"), [("fp4", 64), ("mxfp4", 32), ("nf4", 128)])
def test_codes_are_looked_up_in_the_table_of_their_format_and_block(format, block):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (6, 256), dtype=np.uint8)
    scales = rng.random((6, 256 // block), dtype=np.float32)
    leaf = QuantizedArray(codes[:, ::2] << 4 | codes[:, 1::2], scales, format, "float32")
    expected = nf4.TABLES[format][codes] * np.repeat(scales, block, axis=1)
    np.testing.assert_array_equal(read_back(leaf), expected.T)


def test_e2m1_numbers_are_those_of_sign_exponent_and_mantissa():
    for code, number in enumerate(nf4.TABLES["mxfp4"]):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert number == (-size if sign else size)


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_are_those_of_the_own_dtype_however_read(format):
    leaf = quantize(normal(128, 8), format, dtype="bfloat16")
    own = np.asarray(read_back(leaf))
    assert own.dtype == jnp.bfloat16
    for dtype in ("float32", "float16"):
        np.testing.assert_array_equal(read_back(leaf, dtype), own.astype(dtype))


def test_unknown_format_names_the_nearest():
    with pytest.raises(UserError, match='Did you mean "nf4"'):
        quantize(normal(8, 8), "nf44")


@pytest.mark.parametrize(
    ("in_dim", "group_size", "group"),
    [
        (128, 64, 64),
        (96, 64, 48),
        (80, 64, 40),
        (97, 64, 97),
        (34, 64, 34),
        (34, 32, 17),
        (8, 4, 4),
    ],
)
def test_int4_group_is_the_largest_divisor(in_dim, group_size, group):
    assert group_length(in_dim, group_size) == group
    scales = quantize(normal(in_dim, 3), "int4", group_size=group_size).scales
    assert scales.shape == (in_dim // group, 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_shape_is_the_logical_one(format, shape):
    quantized = quantize(normal(*shape), format)
    assert quantized.shape == shape == jax.eval_shape(dequantize, quantized).shape


@pytest.mark.parametrize("shape", [(256, 40), (80, 67), (2050, 7), (97 * 2, 2), (128, 1)])
@pytest.mark.parametrize("format", FORMATS)
def test_result_does_not_depend_on_chunks(format, shape, monkeypatch):
    weight = normal(*shape)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 10**9)
    whole = quantize(weight, format)
    for elements in (1, 500, 3000):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        assert_same_bits(quantize(weight, format), whole)


@pytest.mark.parametrize("format", FORMATS)
def test_result_does_not_depend_on_memory_order_or_library(format):
    weight = normal(128, 40)
    expected = quantize(weight, format)
    assert_same_bits(quantize(np.asfortranarray(weight), format), expected)
    assert_same_bits(quantize(jnp.asarray(weight), format), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_weight_equals_its_float32_copy(format):
    weight = normal(128, 40).astype(ml_dtypes.bfloat16)
    assert_same_bits(quantize(weight, format), quantize(weight.astype(np.float32), format))


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_outside_jit_equals_inside(format):
    quantized = quantize(normal(80, 6), format)
    np.testing.assert_array_equal(dequantize(quantized), read_back(quantized))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_stacked_layers_dequantize_like_single_ones(format, shape, double_quant):
    layers = [
        quantize(normal(*shape, seed=seed), format, double_quant=double_quant, dtype="bfloat16")
        for seed in range(3)
    ]
    stack: QuantizedArray = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    assert stack.shape == (3, *shape)
    expected = np.stack([read_back(layer) for layer in layers])
    assert expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read_back(stack), expected)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), 0, stack)
    np.testing.assert_array_equal(scanned, expected)


@pytest.mark.parametrize(
    ("format", "double_quant", "constrained"),
    [
        # Codes and scales are gathered; the numbers made of them must stay split as the codes are.
        ("nf4", True, ["8x64xui8", "8x2xui8", "8x128xf32"]),
        ("nf4", False, ["8x64xui8", "8x2xf32", "8x128xf32"]),
        ("int4", True, ["128x8xi4", "2x8xbf16"]),
        ("int8", True, ["128x8xi8", "1x8xf32"]),
    ],
)
def test_gather_moves_packed_bits(format, double_quant, constrained):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    plain = quantize(normal(128, 8), format, double_quant=double_quant)
    leaves = plain.values, plain.scales, format, plain.dtype
    gathered = QuantizedArray(*leaves, gathered=(replicated, replicated))
    text = jax.jit(dequantize).lower(gathered).as_text()
    lines = [line for line in text.splitlines() if "sharding_constraint" in line]
    assert [line.rsplit("<", 1)[1].rstrip(">") for line in lines] == constrained
    np.testing.assert_array_equal(read_back(gathered), read_back(plain))
    half = QuantizedArray(*leaves, gathered=(None, None))
    assert "sharding_constraint" not in jax.jit(dequantize).lower(half).as_text()


def test_flat_scales_are_left_to_the_compiler():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    # A sharding of rank 2, which jax would refuse on the flat scales.
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    weight = normal(80, 6)
    for double_quant in (True, False):
        plain = quantize(weight, "nf4", double_quant=double_quant)
        gathered = QuantizedArray(
            plain.values, plain.scales, "nf4", "float32", (sharding, sharding)
        )
        np.testing.assert_array_equal(read_back(gathered), read_back(plain))


@pytest.mark.parametrize(
    ("format", "double_quant", "bits"),
    [
        ("nf4", False, 4 + 32 / 64),
        # One byte a block of 64, one float32 per 256 blocks, one for the matrix.
        ("nf4", True, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 256**2),
        ("int4", False, 4 + 16 / 64),
        ("int8", False, 8 + 32 / 256),
    ],
)
def test_bits_per_parameter_counts_scales(format, double_quant, bits):
    quantized = quantize(normal(256, 256), format, double_quant=double_quant)
    assert bits_per_parameter(quantized) == pytest.approx(bits, abs=1e-12)
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, quantized))
    assert bits_per_parameter(abstract) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_on_a_gpu_unpacked_numbers_lie_as_their_codes_do(format):
    """Else the codes of all layers are copied in another order before the loop over them."""
    leaf = quantize(normal(128, 8), format)
    traced = jax.jit(dequantize).trace(leaf)
    pinned = {
        platform: "LayoutConstraint" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "cpu", "tpu")
    }
    assert pinned == {"cuda": True, "cpu": False, "tpu": False}
