import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import packers
import pytest
from safetensors.numpy import save_file

from jaxlora.checkpoints import packed_files
from jaxlora.checkpoints.prequantized import read_storage
from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.errors import UserError
from jaxlora.ops.matmul import matmul
from jaxlora.ops.quantize import dequantize, unpack

IN, OUT = 64, 48
WEIGHT = "layer.q_proj.weight"

GPTQ = [
    {},
    {"desc_act": True},
    {"v2": True},
    {"v2": True, "desc_act": True, "group_size": 32},
    {"sym": True, "with_g_idx": False},
    {"group_size": -1},
    {"group_size": 24},  # the last group is short
    {"bits": 8},
    {"bits": 8, "desc_act": True},
    {"dtype": "float32"},
]
COMPRESSED = [
    {},
    {"symmetric": False},
    {"ordered": True},
    {"symmetric": False, "ordered": True, "group_size": 32},
    {"group_size": -1},
    {"bits": 8, "symmetric": False},
    {"dtype": "float16"},
]


def make(kind, options, seed=0):
    """``(storage, tensors, matrix)`` of one random layer."""
    rng = np.random.default_rng(seed)
    tensors, matrix = getattr(packers, kind)(rng, IN, OUT, **options)
    size, bits = options.get("group_size", 16), options.get("bits", 4)
    if kind == "gptq":
        storage = packed_files.gptq(
            bits,
            size,
            desc_act=options.get("desc_act", False),
            zero_offset=0 if options.get("v2") else 1,
        )
    elif kind == "awq":
        storage = packed_files.awq(size)
    else:
        storage = packed_files.compressed_tensors(
            bits,
            size,
            symmetric=options.get("symmetric", True),
            ordered=options.get("ordered", False),
        )
    return storage, tensors, matrix


def write(folder, tensors):
    save_file({f"layer.q_proj.{k}": v for k, v in tensors.items()}, folder / "model.safetensors")
    return TensorFiles(folder)


CASES = [("gptq", case) for case in GPTQ]
CASES += [("awq", {}), ("awq", {"group_size": 32})]
CASES += [("compressed", case) for case in COMPRESSED]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_values_equal_the_reference_maths_bit_for_bit(kind, options, tmp_path):
    storage, tensors, matrix = make(kind, options)
    files = write(tmp_path, tensors)
    assert storage.holds(WEIGHT, files.info)
    leaf = storage.load(files, WEIGHT, (IN, OUT))
    assert leaf.shape == (IN, OUT)
    assert leaf.dtype == matrix.dtype.name
    for read in (dequantize, jax.jit(dequantize)):
        for version in (leaf, unpack(jax.tree.map(jnp.asarray, leaf))):
            ours = np.asarray(read(version))
            assert ours.dtype == matrix.dtype
            np.testing.assert_array_equal(ours, matrix)
    # Read as float32 the numbers are still the 16-bit ones of the format.
    np.testing.assert_array_equal(dequantize(leaf, "float32"), matrix.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "options"), [CASES[1], CASES[10], ("compressed", {"symmetric": False})]
)
def test_matmul_and_its_gradient_equal_the_plain_matrix(kind, options, tmp_path):
    storage, tensors, matrix = make(kind, options)
    leaf = storage.load(write(tmp_path, tensors), WEIGHT, (IN, OUT))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, IN)), jnp.float32)
    plain = jnp.asarray(matrix.astype(np.float32))
    for weight in (leaf, jax.tree.map(jnp.asarray, leaf)):
        y, back = jax.vjp(lambda x, w=weight: matmul(x, w), x)
        expected, expected_back = jax.vjp(lambda x: x @ plain, x)
        # float32 sums of 64 products in another order.
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(back(y)[0], expected_back(y)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"desc_act": True}])
def test_stacked_layers_read_like_single_ones(options, tmp_path):
    leaves, matrices = [], []
    for seed in range(3):
        storage, tensors, matrix = make("gptq", options, seed)
        leaves.append(storage.load(write(tmp_path, tensors), WEIGHT, (IN, OUT)))
        matrices.append(matrix)
    stack = unpack(jax.tree.map(lambda *parts: jnp.stack(parts), *leaves))
    np.testing.assert_array_equal(dequantize(stack), np.stack(matrices))
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), 0, stack)
    np.testing.assert_array_equal(scanned, np.stack(matrices))


def test_only_the_packed_weight_is_kept_for_the_backward_pass(tmp_path):
    storage, tensors, _ = make("gptq", {"desc_act": True})
    leaf = storage.load(write(tmp_path, tensors), WEIGHT, (IN, OUT))
    leaf = unpack(jax.tree.map(jnp.asarray, leaf))
    _, back = jax.vjp(lambda x: matmul(x, leaf), jnp.ones((1, IN)))
    kept = jax.tree.leaves(back)
    assert not [x for x in kept if x.size == IN * OUT and x.dtype != jnp.int4]


def test_a_wrapped_zero_point_of_the_first_gptq_format_is_zero(tmp_path):
    storage, tensors, _ = make("gptq", {})
    tensors["qzeros"] = np.full_like(tensors["qzeros"], -1)  # every stored zero point is 15
    leaf = storage.load(write(tmp_path, tensors), WEIGHT, (IN, OUT))
    assert (leaf.zeros == -8).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), "scales is missing beside layer.q_proj.qweight"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"shape \[7, 48\]; expected \[8, 48\]"),
        (lambda t: t.update(scales=t["scales"].astype("int32")), "dtype I32; expected F16 or"),
        (lambda t: t.update(g_idx=t["g_idx"] + 1), "groups outside 0 to 3"),
    ],
)
def test_damaged_parts_are_named_in_one_line(change, message, tmp_path):
    storage, tensors, _ = make("gptq", {})
    change(tensors)
    files = write(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as caught:
        storage.load(files, WEIGHT, (IN, OUT))
    assert "\n" not in str(caught.value)
    assert "layer.q_proj" in str(caught.value)


def test_a_lying_weight_shape_is_refused(tmp_path):
    storage, tensors, _ = make("compressed", {})
    tensors["weight_shape"] = np.array([OUT, IN + 8])
    with pytest.raises(UserError, match=r"weight_shape is \[48, 72\]; expected \[48, 64\]"):
        storage.load(write(tmp_path, tensors), WEIGHT, (IN, OUT))


def test_a_plain_weight_is_not_held(tmp_path):
    save_file({WEIGHT: np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    assert not packed_files.awq(128).holds(WEIGHT, TensorFiles(tmp_path).info)


def test_config_of_each_method_becomes_its_storage():
    def name(**config):
        return read_storage({"quantization_config": config}).name

    assert name(quant_method="gptq", bits=4, group_size=128) == "GPTQ 4-bit, group size 128"
    assert name(quant_method="awq", bits=4, group_size=64, version="GEMM").startswith("AWQ 4-bit")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
    assert name(**compressed) == "compressed-tensors 4-bit, group size 32"
    assert name(load_in_4bit=True, bnb_4bit_quant_type="nf4") == "bitsandbytes nf4"
    assert name(quant_method="bitsandbytes", load_in_4bit=True) == "bitsandbytes fp4"
    assert name(quant_method="bitsandbytes", load_in_8bit=True) == "bitsandbytes int8"
    assert read_storage({}) is None
    assert dataclasses.is_dataclass(read_storage({"quantization_config": compressed}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method fp8 is not supported"),
        ({"quant_method": "gptq", "bits": 3}, "gptq with bits 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "format int-quantized"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "x"}, "value of the wrong kind"),
        ("nf4", "expected an object"),
    ],
)
def test_unsupported_configs_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message) as caught:
        read_storage({"quantization_config": config})
    assert "\n" not in str(caught.value)
