import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.load import read_model_config
from jaxlora.checkpoints.peft import load_adapter, save_adapter
from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig, match
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import describe

CONFIGS = {
    "all": LoraConfig(r=4, alpha=8),
    "two": LoraConfig(r=4, alpha=6.5, dropout=0.1, target_modules=("q_proj", "v_proj")),
    "layers": LoraConfig(r=2, target_modules=("o_proj", "up_proj"), layers_to_transform=(0, 2)),
    "patterns": LoraConfig(
        r=4,
        alpha=8,
        target_modules=("q_proj", "k_proj", "down_proj"),
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 7, "down_proj": 3},
        alpha_pattern={r"layers\.[02]\..*k_proj": 5, "down_proj": 2},
    ),
    "regex": LoraConfig(r=3, target_modules=r".*\.(0|1)\..*(gate|up)_proj"),
    "rslora": LoraConfig(r=5, alpha=7, use_rslora=True, rank_pattern={"v_proj": 3}),
    "dora": LoraConfig(r=4, use_dora=True, exclude_modules=("k_proj",)),
    "some dora": LoraConfig(r=4, use_dora=True, layers_to_transform=(1,)),
    "head": LoraConfig(r=4, target_modules=("q_proj", "lm_head")),
}


@pytest.fixture(scope="module")
def base(tiny_llama):
    folder = tiny_llama()
    cfg, _ = read_model_config(folder)
    return folder, describe(cfg)


def make(base, config, seed=0):
    """A random adapter and its targets, zero beyond the rank of a layer."""
    _, specs = base
    kinds = ("linear",) if config.target_modules == "all-linear" else ("linear", "head")
    modules = {path: spec.modules() for path, spec in specs.items() if spec.kind in kinds}
    targets = match(modules, config, [path for path, spec in specs.items() if spec.layers])
    rng = np.random.default_rng(seed)
    adapter = {}
    for path, target in targets.items():
        *lead, in_dim, out_dim = specs[path].full_shape
        used = np.arange(target.rank) < np.array(target.ranks).reshape(*lead, 1, 1)
        a = rng.standard_normal((*lead, in_dim, target.rank)) * used
        b = rng.standard_normal((*lead, target.rank, out_dim)) * used.swapaxes(-1, -2)
        pair = {"a": a, "b": b}
        if target.dora:
            pair["magnitude"] = rng.uniform(1, 2, (*lead, out_dim)) * used.any(axis=-1)
        adapter[path] = {part: values.astype(np.float32) for part, values in pair.items()}
    return adapter, targets


@pytest.fixture
def saved(base, tmp_path):
    """Returns a saved adapter folder whose tensors and config a function has changed."""

    def get(change=lambda tensors, config: None, config=CONFIGS["two"]):
        adapter, targets = make(base, config)
        save_adapter(tmp_path / "a", adapter, targets, config, base_name="base")
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        change(tensors, content)
        save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(content))
        return tmp_path / "a"

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_saved_and_loaded_is_bit_identical(base, tmp_path, name):
    config = CONFIGS[name]
    adapter, targets = make(base, config)
    save_adapter(tmp_path / "a", adapter, targets, config, base_name="x")
    again, again_targets, again_config = load_adapter(tmp_path / "a", base[1])
    assert again_targets == targets
    assert (again_config.r, again_config.alpha) == (config.r, config.alpha)
    assert again.keys() == adapter.keys()
    for path, pair in adapter.items():
        assert again[path].keys() == pair.keys()
        for part, values in pair.items():
            assert again[path][part].dtype == np.float32
            np.testing.assert_array_equal(again[path][part], values)
    save_adapter(tmp_path / "b", again, again_targets, again_config, base_name="x")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_files_are_in_pefts_layout(base, tmp_path):
    config = CONFIGS["two"]
    adapter, targets = make(base, config)
    save_adapter(tmp_path, adapter, targets, config, base_name="me/base", revision="main")
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 6.5, "lora_dropout": 0.1, "bias": "none", "revision": "main"}
    expected |= {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": None}
    expected |= {"base_model_name_or_path": "me/base", "init_lora_weights": True}
    assert expected.items() <= content.items()
    assert list(content) == sorted(content)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    pair = adapter["layers/attention/v_proj/kernel"]
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], pair["a"][1].T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], pair["b"][1].T)


def test_whole_alpha_is_written_as_an_integer(base, tmp_path):
    adapter, targets = make(base, CONFIGS["all"])
    save_adapter(tmp_path, adapter, targets, CONFIGS["all"], base_name="x")
    assert '"lora_alpha": 8,' in (tmp_path / "adapter_config.json").read_text()


def test_bfloat16_adapters_load_as_float32(saved, base):
    def change(tensors, config):
        for key in tensors:
            tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)

    adapter, _, _ = load_adapter(saved(change), base[1])
    leaf = adapter["layers/attention/q_proj/kernel"]["a"]
    expected = make(base, CONFIGS["two"])[0]["layers/attention/q_proj/kernel"]["a"]
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, np.asarray(expected).astype(ml_dtypes.bfloat16))


def test_rules_that_match_nothing_in_this_model_are_allowed_as_in_peft(saved, base):
    def change(tensors, config):
        config["target_modules"].append("c_attn")
        config["exclude_modules"] = ["lm_head"]
        config["rank_pattern"] = {"c_attn": 2}

    _, targets, _ = load_adapter(saved(change), base[1])
    assert set(targets) == {f"layers/attention/{name}_proj/kernel" for name in "qv"}


KEY = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
TENSOR_FAULTS = {
    "missing": (lambda t: t.pop(KEY), f"{KEY} is missing \\(1 tensors"),
    "extra": (lambda t: t.update({KEY.replace("q_p", "k_p"): t[KEY]}), "k_proj.* has no place"),
    "full weights": (
        lambda t: t.update({"base_model.model.lm_head.weight": np.ones(2, np.float32)}),
        "modules_to_save",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.x.lora_embedding_A": np.ones(2, np.float32)}),
        "adapter on an embedding",
    ),
    "prefix": (
        lambda t: t.update({k.replace("model.model.", ""): t.pop(k) for k in list(t)}),
        "has no place",
    ),
    "other base": (
        lambda t: t.update({KEY: np.ones((4, 48), np.float32)}),
        f"{KEY} has shape \\[4, 48\\]; expected \\[4, 32\\]",
    ),
    "rank": (
        lambda t: t.update({KEY: np.ones((6, 32), np.float32)}),
        f"{KEY} has shape \\[6, 32\\]; expected \\[4, 32\\]",
    ),
}
CONFIG_FAULTS = {
    "bias": ({"bias": "some"}, "peft_bias: 'some' is unknown"),
    "experts": (
        {"target_parameters": ["mlp.experts"]},
        "lora_dropout: does not go with lora_target_parameters",
    ),
    "unknown": ({"new_feature": {"x": 1}}, "new_feature: .* is not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
    "type": ({"peft_type": "IA3"}, "peft_type: 'IA3' is no LoRA"),
    "rank": ({"r": "many"}, "wrong kind"),
    "no modules": ({"target_modules": None}, "target_modules is missing"),
    "typo": ({"target_modules": "q_porj"}, "does not fit this base model: .*q_porj"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_one_clear_line(saved, base, fault):
    change, expected = TENSOR_FAULTS[fault]
    folder = saved(lambda tensors, config: change(tensors))
    with pytest.raises(UserError, match=expected) as caught:
        load_adapter(folder, base[1])
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_options_we_do_not_have_are_one_clear_line(saved, base, fault):
    change, expected = CONFIG_FAULTS[fault]
    folder = saved(lambda tensors, config: config.update(change))
    with pytest.raises(UserError, match=expected) as caught:
        load_adapter(folder, base[1])
    assert "\n" not in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


def test_pickled_adapter_is_refused(saved, base):
    folder = saved()
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"only adapter_model.bin found, and jaxlora never unpick"):
        load_adapter(folder, base[1])


def test_folder_without_config_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json: not found"):
        load_adapter(tmp_path, base[1])


def test_adapter_for_another_base_of_equal_shape_is_refused(base, tiny_llama, tmp_path):
    config = CONFIGS["two"]
    adapter, targets = make(base, config)
    own, other = base_fingerprint(base[0]), base_fingerprint(tiny_llama(seed=1))
    save_adapter(tmp_path, adapter, targets, config, base_name="x", fingerprint=own)
    load_adapter(tmp_path, base[1], fingerprint=own)
    load_adapter(tmp_path, base[1])
    with pytest.raises(UserError, match="trained on another base model of the same shape"):
        load_adapter(tmp_path, base[1], fingerprint=other)
    save_adapter(tmp_path, adapter, targets, config, base_name="x")
    load_adapter(tmp_path, base[1], fingerprint=other)  # no record, nothing to refuse


def test_diverged_adapter_is_refused_and_the_saved_one_stays(saved, base):
    folder = saved()
    before = (folder / "adapter_model.safetensors").read_bytes()
    adapter, targets = make(base, CONFIGS["two"])
    adapter["layers/attention/q_proj/kernel"]["b"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.lora_B.weight: .*not finite"):
        save_adapter(folder, adapter, targets, CONFIGS["two"], base_name="x")
    assert (folder / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("target", ["attention.output.dense", "intermediate.dense", "output.dense"])
def test_a_name_that_other_modules_have_too_is_written_in_full(tmp_path, target):
    cfg = read_config({"architectures": ["BertForMaskedLM"], "num_hidden_layers": 2})
    specs = describe(cfg)
    every = {path: spec.modules() for path, spec in specs.items() if spec.kind == "linear"}
    config = LoraConfig(r=2, target_modules=rf".*\.layer\.\d\.{re.escape(target)}")
    targets = match(every, config, list(every))
    arrays = {
        path: {
            "a": np.zeros((2, *specs[path].shape[:1], 2)),
            "b": np.zeros((2, 2, specs[path].shape[1])),
        }
        for path in targets
    }
    save_adapter(tmp_path / "a", arrays, targets, config, base_name="x", specs=specs)
    chosen = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    # PEFT's rule: the whole path, or its end after a dot.
    selected = {
        module
        for module in (module for modules in every.values() for module in modules)
        if any(module == name or module.endswith(f".{name}") for name in chosen)
    }
    assert selected == {f"bert.encoder.layer.{layer}.{target}" for layer in range(2)}
