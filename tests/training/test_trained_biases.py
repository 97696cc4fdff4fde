"""Runs that train biases of the base beside the low-rank pairs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora import lora
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter
from jaxlora.generation.probe import probe_logits
from jaxlora.models.parameters import describe
from jaxlora.training.export import export


@pytest.fixture(scope="module")
def biased(tmp_path_factory, write_base):
    return write_base(tmp_path_factory.mktemp("biased") / "base", attention_bias=True)


def test_biases_train_are_exported_and_resumed(run, biased, tmp_path):
    keys = {"base_model": str(biased), "peft_bias": "lora_only", "peft_lora_bias": True}
    keys |= {"save_strategy": None, "save_steps": 2, "max_steps": 4, "quantization": "nf4"}
    whole = run("whole", **keys)
    tensors = load_file(whole.output_dir / "adapter_model.safetensors")
    base = load_file(biased / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    trained = tensors[f"base_model.model.{name}.base_layer.bias"]
    assert np.abs(trained - base[f"{name}.bias"]).max() > 1e-3
    assert np.abs(tensors[f"base_model.model.{name}.lora_B.bias"]).max() > 1e-3
    assert json.loads((whole.output_dir / "adapter_config.json").read_text())["bias"] == "lora_only"
    middle = whole.output_dir / "checkpoints" / "checkpoint-2"
    assert export(middle, tmp_path / "exported") == 2
    half = run("half", **keys, resume_from_checkpoint=str(middle))
    again = load_file(half.output_dir / "adapter_model.safetensors")
    assert tensors.keys() == again.keys()
    assert all(np.array_equal(tensors[key], again[key]) for key in tensors)
    cfg, _ = read_model_config(biased)
    adapter, targets, _ = load_adapter(whole.output_dir, describe(cfg))
    params = load_params(biased, cfg, dtype=jnp.float32)
    plain, adapted = (probe_logits(cfg, p) for p in (params, lora.apply(params, adapter, targets)))
    assert np.abs(plain - adapted).max() > 0.1
