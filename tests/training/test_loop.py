"""What a run leaves in its folder, and that every kind of run learns."""

import json
import math
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxlora.config.derived import OPTIMIZERS
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.training.loop import train

RATES = {
    "adamw": 1e-2,
    "adamw_8bit": 1e-2,
    "lion": 3e-3,
    "sgd": 1.0,
    "adafactor": 1e-2,
    "muon": 1e-2,
}
FULL = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_adapter_metrics_curve_card_and_checkpoint(run, metrics_of, keys):
    result = run(val_set_size=6, max_steps=5, save_strategy=None, save_steps=2)
    folder = result.output_dir
    trained = [record for record in metrics_of(folder) if "loss" in record]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5]
    assert trained[-1]["loss"] == result.loss
    assert {"loss", "grad_norm", "trained_tokens", "learning_rate", "epoch"} <= trained[0].keys()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == keys["base_model"]
    assert front["library_name"] == "peft"
    assert f"{result.eval_loss:.4f}" in card
    assert f"{result.loss:.4f}" in card
    configuration = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert configuration == yaml.safe_load((folder / "config.yml").read_text())
    assert configuration["learning_rate"] == keys["learning_rate"]
    steps = {path.name for path in (folder / "checkpoints").iterdir()}
    assert steps == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()
    peft = pytest.importorskip("peft")
    scope = {"folder": str(folder)}
    exec(card.split("```python\n")[1].split("```")[0], scope)  # what the card tells to do
    assert isinstance(scope["model"], peft.PeftModel)


def test_a_run_from_the_configuration_it_saved_is_the_same_run(run, tmp_path):
    first = run("first", max_steps=3, gradient_accumulation_steps=None, batch_size=4)
    saved = yaml.safe_load((first.output_dir / "config.yml").read_text())
    again = train(load_config(saved | {"output_dir": str(tmp_path / "again")}), quiet=True)
    assert again.loss == first.loss
    adapters = [each.output_dir / "adapter_model.safetensors" for each in (first, again)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_checkpoint_in_the_last_step_is_no_trouble(run):
    result = run(max_steps=2, save_strategy=None, save_steps=2)
    assert {path.name for path in (result.output_dir / "checkpoints").iterdir()} == {"checkpoint-2"}


def test_logging_steps_thin_the_metrics_but_not_the_last_step(run, metrics_of):
    records = metrics_of(run(logging_steps=4).output_dir)
    assert [record["step"] for record in records] == [4, 6]


def test_losses_that_stay_high_end_the_run_and_what_there_is_is_saved(run, metrics_of):
    result = run(loss_watchdog_threshold=1e-3, loss_watchdog_patience=2, logging_steps=4)
    assert result.steps == 2
    assert [record["step"] for record in metrics_of(result.output_dir)] == [2]
    assert (result.output_dir / "adapter_model.safetensors").is_file()
    names = {path.name for path in (result.output_dir / "checkpoints").iterdir()}
    assert names == {"checkpoint-2"}


def test_losses_below_the_threshold_do_not_end_the_run(run):
    assert run(loss_watchdog_threshold=1e3, loss_watchdog_patience=1).steps == 6


def test_held_out_losses_that_fall_no_more_end_the_run(run, metrics_of):
    # At this rate no loss can change: the one before training stays the lowest.
    still = {"learning_rate": 1e-30, "val_set_size": 6, "eval_steps": 1}
    result = run(**still, early_stopping_patience=2)
    records = metrics_of(result.output_dir)
    assert len({record["eval_loss"] for record in records if "eval_loss" in record}) == 1
    assert result.steps == 2
    assert (result.output_dir / "adapter_model.safetensors").is_file()
    # A run that goes on counts those of before.
    assert run(**still, early_stopping_patience=3, resume_from_checkpoint=True).steps == 3


def test_a_held_out_loss_that_falls_goes_on(run):
    assert run(val_set_size=6, eval_steps=1, early_stopping_patience=1).steps == 6


def test_a_used_output_folder_is_refused_and_left_as_it_was(run):
    folder = run(max_steps=1).output_dir
    before = contents(folder)
    with pytest.raises(UserError, match="already holds a run"):
        run(learning_rate=1e-3)
    assert contents(folder) == before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(run, metrics_of, name):
    result = run(optimizer=name, learning_rate=RATES[name], max_steps=16, lr_scheduler="constant")
    losses = [record["loss"] for record in metrics_of(result.output_dir)]
    assert np.mean(losses[-4:]) < np.mean(losses[:2]) - 0.3, losses


def test_random_weights_learn_from_scratch(run, metrics_of, base, tmp_path):
    # Only config.json and the tokenizer are there: nothing can have been read.
    folder = tmp_path / "described"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    result = run(**FULL, base_model=str(folder), reinit_weights=True, max_steps=16)
    losses = [record["loss"] for record in metrics_of(result.output_dir)]
    uniform = math.log(json.loads((base / "config.json").read_text())["vocab_size"])
    assert losses[0] == pytest.approx(uniform, abs=0.3)
    assert losses[-1] < losses[0] - 1
    assert (result.output_dir / "model.safetensors").is_file()


def test_held_out_rows_are_evaluated_before_during_and_after(run, metrics_of):
    result = run(val_set_size=6, eval_steps=2, max_steps=5)
    measured = {
        r["step"]: r["eval_loss"] for r in metrics_of(result.output_dir) if "eval_loss" in r
    }
    assert list(measured) == [0, 2, 4, 5]
    assert measured[0] == result.eval_loss_before
    assert measured[5] == result.eval_loss
    assert result.eval_loss < result.eval_loss_before


def test_evaluation_is_the_same_with_dropout_packing_and_other_rows(run):
    plain = run("plain", val_set_size=6, max_steps=1).eval_loss_before
    other = run("other", val_set_size=6, max_steps=1, lora_dropout=0.5, eval_sample_packing=True,
                eval_batch_size=3)  # fmt: skip
    assert other.eval_loss_before == pytest.approx(plain, rel=1e-6)  # float32, other order


def test_exact_match_is_counted_before_and_after(run, metrics_of):
    result = run(val_set_size=4, eval_exact_match=True, eval_max_new_tokens=3, max_steps=2)
    scores = {
        r["step"]: r["exact_match"] for r in metrics_of(result.output_dir) if "exact_match" in r
    }
    assert scores == {0: result.exact_match_before, 2: result.exact_match}
    assert result.exact_match == 0  # three tokens of a model that has seen two batches


def test_an_adapter_is_continued(run, metrics_of):
    first = run("first", max_steps=8, lr_scheduler="constant")
    start = str(first.output_dir)
    again = run("again", lora_model_dir=start, max_steps=1, learning_rate=1e-12)
    fresh = metrics_of(first.output_dir)[0]["loss"]
    assert again.loss < fresh - 0.1
    was = load_file(first.output_dir / "adapter_model.safetensors")
    now = load_file(again.output_dir / "adapter_model.safetensors")
    assert was.keys() == now.keys()
    for name in was:  # the step is 1e-12 long
        np.testing.assert_allclose(now[name], was[name], atol=1e-10, rtol=0)


def test_tensorboard_gets_every_number(run):
    pytest.importorskip("tensorboardX")
    folder = run(use_tensorboard=True, max_steps=2).output_dir / "tensorboard"
    (events,) = folder.glob("events.out.tfevents.*")
    written = events.read_bytes()
    assert all(name in written for name in (b"loss", b"grad_norm", b"learning_rate"))


def test_weights_and_biases_writes_offline(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = run(wandb_project="tiny", wandb_mode="offline", max_steps=2)
    (folder,) = (result.output_dir / "wandb").glob("offline-run-*")
    assert any(path.stat().st_size for path in folder.glob("*.wandb"))
