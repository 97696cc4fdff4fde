"""Weights that bitsandbytes itself wrote, read back bit for bit."""

import jax
import numpy as np
import pytest

from jaxlora.checkpoints.bitsandbytes_files import LLM_INT8, four_bit
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.generation.probe import probe_logits, probe_tokens
from jaxlora.models.parameters import describe
from jaxlora.ops import nf4
from jaxlora.ops.arrays import DoubleQuantized, QuantizedArray
from jaxlora.ops.quantize import dequantize

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

WEIGHT = "layer.q_proj.weight"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# [out, in]: whole blocks, more than 256 of them, blocks across rows, a short last block.
SHAPES = [(24, 128), (257, 128), (33, 66), (5, 34)]


def write(folder, tensors):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return TensorFiles(folder)


def random_weight(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    return weight.to(DTYPES[dtype])


def quantized(shape, format, double_quant, dtype):
    """``(tensors as a checkpoint has them, what bitsandbytes reads back as float32)``."""
    packed, state = functional.quantize_4bit(
        random_weight(shape, dtype),
        blocksize=64,
        quant_type=format,
        compress_statistics=double_quant,
    )
    parts = state.as_dict(packed=True)
    tensors = {WEIGHT: packed} | {f"{WEIGHT}.{name}": value for name, value in parts.items()}
    return tensors, functional.dequantize_4bit(packed, state).float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bit_weight_equals_bitsandbytes_reading(shape, format, double_quant, dtype, tmp_path):
    tensors, theirs = quantized(shape, format, double_quant, dtype)
    files = write(tmp_path, tensors)
    storage = four_bit(format)
    assert storage.holds(WEIGHT, files.info)
    leaf = storage.load(files, WEIGHT, shape[::-1])
    assert leaf.dtype == dtype
    assert isinstance(leaf.scales, DoubleQuantized) == double_quant
    ours = np.asarray(jax.jit(dequantize)(leaf))
    assert ours.dtype.name == dtype
    np.testing.assert_array_equal(ours.astype(np.float32).T, theirs)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_tables_equal_bitsandbytes(format):
    theirs = functional.get_4bit_type(format, device="cpu").numpy()
    np.testing.assert_array_equal(nf4.TABLES[format], theirs)


def test_bytes_under_another_dtype_are_the_same_bytes(tmp_path):
    tensors, theirs = quantized((24, 128), "nf4", True, "bfloat16")
    tensors[WEIGHT] = tensors[WEIGHT].reshape(-1, 2).view(torch.bfloat16)
    leaf = four_bit("nf4").load(write(tmp_path, tensors), WEIGHT, (128, 24))
    np.testing.assert_array_equal(np.asarray(dequantize(leaf, "float32")).T, theirs)


def test_a_dynamic_map_of_another_machine_is_used_as_stored(tmp_path):
    tensors, theirs = quantized((24, 128), "nf4", True, "float32")
    other = np.nextafter(nf4.DYNAMIC_MAP, np.float32(2))
    tensors[f"{WEIGHT}.nested_quant_map"] = torch.from_numpy(other)
    leaf = four_bit("nf4").load(write(tmp_path, tensors), WEIGHT, (128, 24))
    np.testing.assert_array_equal(leaf.scales.map, other)
    ours = np.asarray(dequantize(leaf)).T
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)  # a few units in the last place


@pytest.mark.parametrize("shape", [(24, 128), (33, 70), (5, 35)])
def test_int8_weight_equals_llm_int8(shape, tmp_path):
    codes, largest, _ = functional.int8_vectorwise_quant(random_weight(shape, "float16"))
    tensors = {
        WEIGHT: codes,
        "layer.q_proj.SCB": largest,
        "layer.q_proj.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    files = write(tmp_path, tensors)
    assert LLM_INT8.holds(WEIGHT, files.info)
    leaf = LLM_INT8.load(files, WEIGHT, shape[::-1])
    np.testing.assert_array_equal(leaf.values.T, codes.numpy())
    theirs = functional.int8_vectorwise_dequant(codes, largest).numpy()
    # q * SCB * (1 / 127) against q * (SCB / 127): two float32 roundings each.
    np.testing.assert_allclose(dequantize(leaf).T, theirs, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("nf4", {".absmax": None}, "weight.absmax is missing"),
        ("nf4", {"": torch.zeros(7, 1, dtype=torch.uint8)}, "has 7 bytes; expected 1536"),
        ("nf4", {".absmax": torch.zeros(3, dtype=torch.uint8)}, "absmax has 3 numbers; expected"),
        ("nf4", {".quant_map": torch.zeros(16)}, "quant_map is another table"),
        ("nf4", {".nested_absmax": torch.zeros(2)}, "nested_absmax has 2 numbers; expected 1"),
        ("nf4", {".quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}, "damaged"),
    ],
)
def test_damaged_parts_are_named_in_one_line(format, change, message, tmp_path):
    tensors, _ = quantized((24, 128), format, True, "bfloat16")
    for suffix, value in change.items():
        if value is None:
            del tensors[WEIGHT + suffix]
        else:
            tensors[WEIGHT + suffix] = value
    with pytest.raises(UserError, match=message) as caught:
        four_bit(format).load(write(tmp_path, tensors), WEIGHT, (128, 24))
    assert "\n" not in str(caught.value)
    assert WEIGHT in str(caught.value)


def test_a_state_of_another_shape_is_refused(tmp_path):
    tensors, _ = quantized((24, 128), "nf4", True, "bfloat16")
    with pytest.raises(UserError, match=r"says shape \[24, 128\]; expected \[48, 64\]"):
        four_bit("nf4").load(write(tmp_path, tensors), WEIGHT, (64, 48))


def test_tiles_of_a_gpu_are_refused(tmp_path):
    tensors = {
        WEIGHT: torch.zeros(8, 16, dtype=torch.int8),
        "layer.q_proj.SCB": torch.ones(8),
        "layer.q_proj.weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    with pytest.raises(UserError, match=r"weight_format is 2.*expected 0"):
        LLM_INT8.load(write(tmp_path, tensors), WEIGHT, (16, 8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, write_tiny_llama):
    """``saved(format, dtype, **options) -> (folder, model)``: what transformers made, saved."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    plain = write_tiny_llama(root / "plain", **sizes)

    def make(format, dtype, **options):
        if format == "int8":
            config = transformers.BitsAndBytesConfig(load_in_8bit=True, **options)
        else:
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=format,
                bnb_4bit_compute_dtype=DTYPES[dtype],
                **options,
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plain, dtype=DTYPES[dtype], quantization_config=config, local_files_only=True
        )
        folder = root / f"{format}-{dtype}-{len(options)}"
        model.save_pretrained(folder)
        return folder, model.eval()

    return make


@pytest.mark.parametrize(
    ("format", "dtype", "options"),
    [
        ("nf4", "float32", {"bnb_4bit_use_double_quant": True}),
        ("nf4", "bfloat16", {"bnb_4bit_quant_storage": "bfloat16"}),
        ("fp4", "float32", {}),
        ("nf4", "float32", {"llm_int8_skip_modules": ["down_proj", "lm_head"]}),
    ],
)
def test_a_repository_that_transformers_saved_is_the_model_it_saved(saved, format, dtype, options):
    folder, theirs = saved(format, dtype, **options)
    cfg, _ = read_model_config(folder)
    leaves = flatten(params := load_params(folder, cfg, dtype="float32"))
    for path, spec in describe(cfg).items():
        for layer, module in enumerate(spec.modules() if spec.kind == "linear" else []):
            weight = theirs.get_submodule(module).weight
            leaf = jax.tree.map(lambda x, layer=layer: x[layer], leaves[path])
            if "int8_skip" in str(options) and module.endswith("down_proj"):
                assert not isinstance(leaf, QuantizedArray)
                continue
            assert leaf.format == format
            expected = functional.dequantize_4bit(weight.data, weight.quant_state)
            ours = np.asarray(dequantize(leaf, "float32")).T
            np.testing.assert_array_equal(ours, expected.float().numpy(), err_msg=module)
    if dtype == "float32":
        # With gradients: without them bitsandbytes multiplies in bfloat16 on a CPU (0.1 off here).
        logits = theirs(torch.from_numpy(probe_tokens(cfg))).logits.detach().numpy()
        # float32, three layers, logits of standard deviation about 1.
        np.testing.assert_allclose(probe_logits(cfg, params), logits, atol=2e-5)


def test_an_int8_repository_that_transformers_saved_has_its_numbers(saved):
    folder, theirs = saved("int8", "float16")
    cfg, _ = read_model_config(folder)
    leaves = flatten(load_params(folder, cfg, dtype="float32"))
    for path, spec in describe(cfg).items():
        for layer, module in enumerate(spec.modules() if spec.kind == "linear" else []):
            weight = theirs.get_submodule(module).weight
            leaf = jax.tree.map(lambda x, layer=layer: x[layer], leaves[path])
            np.testing.assert_array_equal(np.asarray(leaf.values).T, weight.CB.numpy())
            largest = (np.asarray(leaf.scales[0]) * 127).astype(np.float16)
            np.testing.assert_array_equal(largest, weight.SCB.numpy().astype(np.float16))
