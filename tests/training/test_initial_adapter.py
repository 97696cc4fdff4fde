"""Runs whose adapter starts as a part of the base: training, export, restart."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlora
from jaxlora import lora
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.generation.model import load
from jaxlora.generation.probe import probe_logits
from jaxlora.models.parameters import describe
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.training import loop, shared_folder
from jaxlora.training.export import export
from jaxlora.training.state import quant_spec
from jaxlora.training.step import weights

INT4 = {"adapter": "qlora", "quantization": "int4"}
STARTS = {
    "pissa": {"peft_init_lora_weights": "pissa"},
    "pissa_niter": {"peft_init_lora_weights": "pissa_niter_2", "peft_use_dora": True},
    "olora": {"peft_init_lora_weights": "olora", "peft_use_rslora": True},
    "patterns": {
        "peft_init_lora_weights": "pissa",
        "lora_rank_pattern": {"v_proj": 2},
        "lora_alpha_pattern": {r"layers\.1\..*": 6},
    },
}


@pytest.fixture
def trained_logits(monkeypatch):
    """``trained_logits()``: of the model as the last run had it, on its own base."""
    seen = {}

    def load_weights(*args):
        trainable, seen["frozen"] = load(*args)
        return trainable, seen["frozen"]

    def exported(config, model, state, *rest):
        seen.update(state=state, model=model)
        return write(config, model, state, *rest)

    load, write = loop.load_weights, shared_folder.export_weights
    monkeypatch.setattr(loop, "load_weights", load_weights)
    monkeypatch.setattr(shared_folder, "export_weights", exported)

    def logits():
        model = seen["model"]
        params = weights(seen["state"]["trainable"], seen["frozen"], model.targets)
        return probe_logits(model.cfg, params)

    return logits


def logits_of(base, folder, **options):
    cfg, _ = read_model_config(base)
    params = load_params(base, cfg, dtype=jnp.float32, **options)
    arrays, targets, _ = load_adapter(folder, describe(cfg))
    return probe_logits(cfg, lora.apply(params, arrays, targets))


@pytest.mark.parametrize("name", STARTS)
def test_exported_adapter_on_the_plain_base_is_the_model_that_was_trained(
    run, base, trained_logits, name
):
    result = run(**STARTS[name])
    trained = trained_logits()
    exported = logits_of(base, result.output_dir)
    # float32: the base less a part and plus it again.
    np.testing.assert_allclose(exported, trained, atol=1e-4 * trained.std())
    written = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert written["r"] == 8
    assert written["init_lora_weights"] is True
    config = load_config(result.output_dir / "config.yml")
    assert config.peft_init_lora_weights == STARTS[name]["peft_init_lora_weights"]


def test_a_quantized_base_starts_nearer_to_the_plain_one(run):
    def first_loss(name, **keys):
        return run(name, val_set_size=6, max_steps=1, **keys).eval_loss_before

    plain, usual = first_loss("plain"), first_loss("usual", **INT4)
    for init in ("pissa_niter_4", "loftq"):
        split = first_loss(init, **INT4, peft_init_lora_weights=init)
        assert abs(split - plain) < abs(usual - plain)


def test_of_a_quantized_base_the_plain_one_comes_nearest_to_what_was_trained(
    run, base, trained_logits
):
    """What was quantized was the rest of each matrix, so not the base that others quantize."""
    result = run(**INT4, peft_init_lora_weights="pissa", max_steps=4)
    trained = trained_logits()
    int4 = quant_spec(load_config(result.output_dir / "config.yml"))
    assert int4 is not None
    assert int4.format == "int4"
    plain, quantized = (
        np.abs(logits_of(base, result.output_dir, quantization=each) - trained).mean()
        for each in (None, int4)
    )
    assert plain < 0.8 * quantized
    answered = load(result.output_dir)
    assert not any(isinstance(x, QuantizedArray) for x in flatten(answered.params).values())
    with pytest.raises(UserError, match=r"pissa.*nobody else has.*plain base"):
        jaxlora.merge(result.output_dir, None, result.output_dir / "m", quantization="trained")


def test_a_checkpoint_exports_the_same_adapter_without_the_weights(run, tmp_path, monkeypatch):
    result = run(peft_init_lora_weights="pissa", save_strategy=None, save_steps=6)
    monkeypatch.setattr("jaxlora.checkpoints.load.load_params", None)
    assert export(result.output_dir, tmp_path / "again") == 6
    ours = load_file(result.output_dir / "adapter_model.safetensors")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert ours.keys() == again.keys()
    assert all(np.array_equal(ours[key], again[key]) for key in ours)


def test_an_exported_adapter_starts_a_run_of_twice_the_rank(run, metrics_of):
    first = run("first", peft_init_lora_weights="olora", max_steps=8, lr_scheduler="constant")
    start = str(first.output_dir)
    again = run("again", lora_model_dir=start, max_steps=1, learning_rate=1e-12)
    assert again.loss < metrics_of(first.output_dir)[0]["loss"] - 0.1
    was = load_file(first.output_dir / "adapter_model.safetensors")
    now = load_file(again.output_dir / "adapter_model.safetensors")
    for key in was:
        np.testing.assert_allclose(now[key], was[key], atol=1e-10, rtol=0)


def test_a_checkpoint_does_not_go_on_from_another_start(run):
    run(peft_init_lora_weights="pissa", save_strategy=None, save_steps=2, max_steps=4)
    with pytest.raises(UserError, match="peft_init_lora_weights was 'pissa'"):
        run(peft_init_lora_weights="olora", save_steps=2, max_steps=4, save_strategy=None,
            resume_from_checkpoint=True)  # fmt: skip
