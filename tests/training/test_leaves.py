"""What trains beside low-rank pairs, from `train` over resume and export to `merge`."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlora
from jaxlora.checkpoints.adapter import read_adapter
from jaxlora.checkpoints.fitted import load_base
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.generation.probe import probe_logits
from jaxlora.lora.config import LoraConfig
from jaxlora.models.families.read import read_config
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.training.describe import describe_weights
from jaxlora.training.leaves import trained_leaves
from jaxlora.training.setup import make_plan
from jaxlora.training.state import init_optimizer, load_weights, make_tx

WHOLE = {"lora_modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}

PUBLISHED = Path(__file__).parents[1] / "models" / "configs"
ADAPTER = ("adapter", "lora_r", "lora_alpha", "lora_target_modules")


def adapter_file(folder):
    return load_file(folder / "adapter_model.safetensors")


def logits_of(base, adapter_folder):
    stored, _ = read_model_config(base)
    adapter = read_adapter(adapter_folder, stored)
    params = load_base(base, stored, adapter.cfg, dtype="float32", trained=adapter.parts)
    return probe_logits(adapter.cfg, adapter.on(params))


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory, write_base):
    return write_base(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


def test_whole_modules_train_resume_export_merge(tied_base, run, tmp_path):
    changes = {**WHOLE, "base_model": str(tied_base), "save_steps": 3, "save_strategy": None}
    run("run", **changes)
    exported = tmp_path / "exported"
    jaxlora.export(tmp_path / "run", exported)
    tensors, before = adapter_file(exported), load_file(tied_base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = np.abs(tensors[f"base_model.model.{name}"] - before["model.embed_tokens.weight"])
        assert moved.max() > 1e-3
    assert json.loads((exported / "adapter_config.json").read_text())["modules_to_save"] == [
        "embed_tokens",
        "lm_head",
        "model.norm",
    ]
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("*3"))
    run("again", **changes, resume_from_checkpoint=str(checkpoint))
    for key, values in adapter_file(tmp_path / "again").items():
        np.testing.assert_array_equal(values, tensors[key], err_msg=key)

    merged = jaxlora.merge(exported, None, tmp_path / "merged", dtype="float32")
    cfg, raw = read_model_config(merged)
    assert raw["tie_word_embeddings"] is False
    ours = logits_of(tied_base, exported)
    # float32, the low-rank product summed first or last.
    np.testing.assert_allclose(
        probe_logits(cfg, load_params(merged, cfg, dtype="float32")), ours, atol=2e-5
    )
    assert len(jaxlora.generate(exported, ["one"], max_new_tokens=2)) == 1
    run("further", **changes, lora_model_dir=str(exported), max_steps=1, learning_rate=1e-9)
    for key, values in adapter_file(tmp_path / "further").items():
        np.testing.assert_allclose(values, tensors[key], atol=1e-6, err_msg=key)  # lr 1e-9


def test_token_rows_train_resume_export_merge(tied_base, run, tmp_path):
    changes = {
        "peft_trainable_token_indices": [9, 5, 40],
        "base_model": str(tied_base),
        "save_steps": 3,
        "save_strategy": None,
    }
    run("run", **changes)
    tensors = adapter_file(tmp_path / "run")
    rows = tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    before = load_file(tied_base / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape == (3, before.shape[1])
    assert np.abs(rows - before[[5, 9, 40]]).max() > 1e-3
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("*3"))
    run("again", **changes, resume_from_checkpoint=str(checkpoint))
    for key, values in adapter_file(tmp_path / "again").items():
        np.testing.assert_array_equal(values, tensors[key], err_msg=key)
    others = {**changes, "peft_trainable_token_indices": [9, 5, 41]}
    with pytest.raises(UserError, match="resume_from_checkpoint: parts was"):
        run("other", **others, resume_from_checkpoint=str(checkpoint))
    merged = jaxlora.merge(tmp_path / "run", None, tmp_path / "merged", dtype="float32")
    table = load_file(merged / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[[5, 9, 40]], rows)
    others = np.setdiff1d(np.arange(len(before)), [5, 9, 40])
    np.testing.assert_array_equal(table[others], before[others])


def test_peft_verifies_pairs_on_both_tables_of_a_tied_model(tied_base, run, tmp_path):
    pytest.importorskip("peft")
    rule = {
        "lora_target_linear": None,
        "lora_target_modules": ["q_proj", "embed_tokens", "lm_head"],
    }
    run("run", base_model=str(tied_base), max_steps=2, **rule)
    verdict = jaxlora.verify(tmp_path / "run")
    assert verdict.ok, verdict
    assert verdict.adapter_effect > 0.1


def test_only_unfrozen_parameters_move(base, run, tmp_path):
    wanted = ["lm_head.weight$", r"model.layers.1.mlp.up_proj", "model.embed_tokens.weight[20:300]"]
    none = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_linear"))
    run("run", **none, unfrozen_parameters=wanted, learning_rate=1e-3)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    }
    name = "model.embed_tokens.weight"
    rows = np.flatnonzero((before[name] != after[name]).any(axis=1))
    assert set(rows) <= set(range(20, 300))


def open_run(keys, tmp_path, **changes):
    plan = make_plan(load_config({**keys, "output_dir": str(tmp_path), **changes}))
    return plan, *load_weights(plan.config, plan.model)


def test_whole_modules_stay_plain_on_a_quantized_base(keys, tmp_path):
    plan, trainable, frozen = open_run(
        keys,
        tmp_path,
        lora_modules_to_save=["down_proj", "lm_head"],
        lora_target_linear=False,
        lora_target_modules=["q_proj"],
        load_in_4bit=True,
    )
    assert trainable["params"].keys() == {"layers/mlp/down_proj/kernel", "lm_head/kernel"}
    assert not trainable["params"].keys() & frozen.keys()
    assert {leaf.dtype.name for leaf in trainable["params"].values()} == {"float32"}
    assert isinstance(frozen["layers/mlp/up_proj/kernel"], QuantizedArray)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert f"{trained:,} trained" in describe_weights(plan, trainable, frozen)


def test_what_peft_has_no_adapter_for_is_refused_before_training(keys, tmp_path):
    """DeepSeek has dense layers below those with experts."""
    raw = json.loads((PUBLISHED / "DeepSeek-V3.json").read_text())
    cfg, config = read_config(raw), load_config({**keys, "output_dir": str(tmp_path)})
    options = LoraConfig(r=4, alpha=8, use_dora=True)
    with pytest.raises(UserError, match=r"peft_use_dora: .*gate_proj.*experts"):
        trained_leaves(config, cfg, options, None)


def test_norms_that_train_do_not_decay(keys, tmp_path):
    plan, trainable, _ = open_run(
        keys, tmp_path, lora_modules_to_save=["norm", "lm_head"], weight_decay=0.5
    )
    optimizer, _ = make_tx(plan.config, trainable, plan.model.specs, 10)
    state = init_optimizer(optimizer, trainable, plan.model.placement)
    # The first steps are warm-up, of which the very first has a learning rate of zero.
    zeros = jax.tree.map(np.zeros_like, trainable)
    for _ in range(3):
        updates, state = optimizer.update(zeros, state, trainable)
    moved = {path: float(np.abs(x).max()) for path, x in updates["params"].items()}
    assert moved["lm_head/kernel"] > 0
    assert {path for path, size in moved.items() if size == 0} == set(moved) - {"lm_head/kernel"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_modules_to_save": ["lm_heat"]}, "lora_modules_to_save: 'lm_heat' .*lm_head"),
        ({"lora_modules_to_save": ["proj"]}, "lora_modules_to_save: .*[qv]_proj.*lora_target_mod"),
        (
            {"unfrozen_parameters": ["lm_heat"], **dict.fromkeys(ADAPTER)},
            "unfrozen_parameters: 'lm_heat' matches no parameter.*lm_head",
        ),
        ({"peft_trainable_token_indices": [99999]}, "peft_trainable_.*no token 99999"),
        (
            {**WHOLE, "adapter": None, "lora_target_modules": None},
            "lora_modules_to_save: without an adapter",
        ),
    ],
)
def test_a_rule_that_cannot_be_followed_is_named_in_one_line(changes, message, keys, tmp_path):
    rule = {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}
    values = {**keys, "output_dir": str(tmp_path), **rule, **changes}
    with pytest.raises(UserError, match=message) as caught:
        make_plan(load_config({k: v for k, v in values.items() if v is not None}))
    assert "\n" not in str(caught.value)
