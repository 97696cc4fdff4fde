"""gpt-oss as released: experts in MXFP4, against transformers' own conversion."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.ops.quantize import dequantize

torch = pytest.importorskip("torch")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 29))
# The block size of 32 must divide the sizes, 64 + 32 has an odd number of blocks.
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def released(make_case, tmp_path_factory):
    """``(folder, pair)``: random codes in the files, their numbers in transformers' model."""
    folder = tmp_path_factory.mktemp("mxfp4")
    case = CASES["gpt-oss"]
    pair = make_case(dataclasses.replace(case, fields={**case.fields, **SIZES}))
    pair.torch_model.save_pretrained(folder)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    experts = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
    parameters = dict(pair.torch_model.named_parameters())
    for name in experts:
        count, in_dim, out_dim = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (count, out_dim, in_dim // 32, 16), np.uint8)
        scales = rng.integers(121, 125, blocks.shape[:-1], np.uint8)  # logits of about 1
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        numbers = mxfp4.convert_moe_packed_tensors(
            torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
        )
        parameters[name].data.copy_(numbers)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, pair


def test_numbers_equal_transformers_bit_for_bit(released):
    folder, pair = released
    cfg, _ = read_model_config(folder)
    leaves = flatten(load_params(folder, cfg, dtype="float32"))
    for ours in ("gate_up_proj", "down_proj"):
        leaf = leaves[f"layers/mlp/experts/{ours}/kernel"]
        assert isinstance(leaf, QuantizedArray)
        assert leaf.values.dtype == jnp.uint8
        for layer in range(cfg.num_layers):
            wanted = (
                getattr(pair.torch_model.model.layers[layer].mlp.experts, ours).detach().numpy()
            )
            np.testing.assert_array_equal(dequantize(leaf, jnp.float32)[layer], wanted)


def test_logits_equal_transformers(released):
    folder, pair = released
    cfg, _ = read_model_config(folder)
    pair = dataclasses.replace(pair, params=load_params(folder, cfg, dtype="float32"))
    wanted = pair.torch_logits(TOKENS)
    assert 0.6 < wanted.std() < 1.8
    # float32 on both sides; a few layers of another order of summation.
    np.testing.assert_allclose(pair.logits(TOKENS), wanted, atol=2e-5)


def test_a_scale_that_is_not_a_number_is_refused_by_name(released, tmp_path):
    folder, _ = released
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 3, 1] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    cfg, _ = read_model_config(tmp_path)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj.* not a number"):
        load_params(tmp_path, cfg, dtype="float32")
