import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.checkpoints.load import QuantSpec, load_params, read_model_config
from jaxlora.checkpoints.save import save_model
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten, replace
from jaxlora.lora import LoraConfig, apply, init, match, merge
from jaxlora.models.parameters import describe, init_params
from jaxlora.ops.matmul import materialize


@pytest.fixture(scope="module")
def model(tiny_llama):
    folder = tiny_llama()
    cfg, _ = read_model_config(folder)
    return folder, cfg, load_params(folder, cfg, dtype="float32")


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


def test_loaded_and_saved_again_is_the_same_file_content(model, tmp_path):
    folder, cfg, params = model
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("left behind")
    save_model(params, cfg, tmp_path / "out", source_folder=folder)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert_same_tensors(after, before)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_hold_every_tensor_once_within_the_limit(model, tmp_path):
    folder, cfg, params = model
    save_model(params, cfg, tmp_path, source_folder=folder, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {file: load_file(tmp_path / file) for file in set(index["weight_map"].values())}
    assert len(shards) > 2
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert max(sizes) <= 40_000
    assert index["metadata"]["total_size"] == sum(sizes)
    for file, shard in shards.items():
        assert all(index["weight_map"][name] == file for name in shard)
    again = load_params(tmp_path, cfg, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_dtype_is_converted_and_recorded(model, tmp_path):
    folder, cfg, params = model
    save_model(params, cfg, tmp_path, source_folder=folder, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for tensor in load_file(tmp_path / "model.safetensors").values():
        assert tensor.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("format", ["int4", "nf4", "int8"])
def test_quantized_leaves_are_saved_as_what_they_stand_for(tiny_llama, tmp_path, format):
    folder = tiny_llama(intermediate_size=32, num_key_value_heads=4)  # one shape: compiled once
    cfg, _ = read_model_config(folder)
    params = load_params(folder, cfg, dtype="float32", quantization=QuantSpec(format))
    save_model(params, cfg, tmp_path, source_folder=folder)
    again = flatten(load_params(tmp_path, cfg, dtype="float32"))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[path], materialize(leaf), err_msg=path)


def test_lora_leaves_are_saved_merged(model, tmp_path):
    folder, cfg, params = model
    specs = describe(cfg)
    modules = {path: spec.modules() for path, spec in specs.items() if spec.kind == "linear"}
    targets = match(modules, LoraConfig(r=3, target_modules=("v_proj", "up_proj")), modules)
    adapter = jax.tree.map(lambda x: x + 0.1, init(params, targets, jax.random.key(0)))
    save_model(apply(params, adapter, targets), cfg, tmp_path, source_folder=folder)
    merged = merge(params, adapter, targets)
    again = load_params(tmp_path, cfg, dtype="float32")
    # The same float32 products, summed in an order that may differ under jit.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, merged)


def test_fresh_model_is_written_from_a_config_alone(tiny_llama, tmp_path):
    cfg, raw = read_model_config(tiny_llama(tie_word_embeddings=True))
    params = init_params(cfg, jax.random.key(0), jnp.float32)
    save_model(params, cfg, tmp_path / "new", config=raw)
    again_cfg, _ = read_model_config(tmp_path / "new")
    assert again_cfg == cfg
    again = load_params(tmp_path / "new", cfg, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert "lm_head.weight" not in load_file(tmp_path / "new" / "model.safetensors")


def test_values_that_are_not_finite_are_refused_and_nothing_is_written(model, tmp_path):
    folder, cfg, params = model
    leaf = flatten(params)["layers/mlp/up_proj/kernel"]
    bad = replace(params, {"layers/mlp/up_proj/kernel": leaf.at[2, 3, 4].set(1e5)})
    with pytest.raises(UserError, match=r"layers.2.mlp.up_proj.weight: .* not finite in float16"):
        save_model(bad, cfg, tmp_path / "out", source_folder=folder, dtype=jnp.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_replaced_only_when_asked_and_then_whole(model, tmp_path):
    folder, cfg, params = model
    (tmp_path / "log.txt").write_text("stays")
    save_model(params, cfg, tmp_path, source_folder=folder, max_shard_bytes=40_000)
    with pytest.raises(UserError, match=r"already holds a model \(model-00001-of"):
        save_model(params, cfg, tmp_path, source_folder=folder)
    save_model(params, cfg, tmp_path, source_folder=folder, overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if name.startswith("model")} == {"model.safetensors"}
    assert "log.txt" in names
