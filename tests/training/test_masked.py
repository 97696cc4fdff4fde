"""Masked-language modelling as a run: it learns, resumes, exports, and is refused where wrong."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.checkpoints.load import read_model_config
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.generation.model import load
from jaxlora.training.evaluation import evaluate
from jaxlora.training.loop import train

NOUNS, COLOURS = ("cat", "dog", "river"), ("red", "green", "blue")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, write_encoder):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Every noun has its colour, so that either can be told from the other."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(120):
            pairs = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            text = " and ".join(f"the {NOUNS[i]} is {COLOURS[i]}" for i in pairs)
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def run(encoder, texts, tmp_path):
    def start(name="run", **changes):
        keys = {
            "base_model": str(encoder),
            "datasets": [{"path": str(texts), "type": "completion"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "val_set_size": 20,
            "output_dir": str(tmp_path / name),
            "objective": "mlm",
            "sequence_len": 32,
            "sample_packing": True,
            "micro_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            **changes,
        }
        keys = {key: value for key, value in keys.items() if value is not None}
        return train(load_config(keys), quiet=True)

    return start


TABLE = "base_model.model.bert.embeddings.word_embeddings"
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def test_a_full_run_learns_and_evaluates_as_it_printed(run):
    result = run(max_steps=60, micro_batch_size=16, sample_packing=False, mlm_probability=0.3)
    # 3.0 nats is a guess among 21 tokens; half the words here follow from the others.
    assert result.eval_loss_before > 2.8
    assert result.eval_loss < 1.7
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    again = evaluate(
        load_config(result.output_dir / "config.yml", [f"--base_model={result.output_dir}"])
    )
    # Weights went through a file of the same dtype.
    assert again.loss == pytest.approx(result.eval_loss, rel=1e-5)


def test_a_lora_run_learns_and_its_adapter_has_no_task_type(run):
    result = run(max_steps=30, **LORA)
    assert result.eval_loss < result.eval_loss_before - 0.3
    written = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert written["task_type"] is None
    assert "fill-mask" in (result.output_dir / "README.md").read_text()


@pytest.mark.parametrize("storage", [None, "int8"])
def test_an_encoder_learns_a_new_token(run, encoder, storage):
    size = read_model_config(encoder)[0].vocab_size
    rows = {"peft_trainable_token_indices": [size], "mean_resizing_embeddings": True}
    result = run(**LORA, **rows, tokens=["ca"], max_steps=4, quantization=storage)
    tensors = load_file(result.output_dir / "adapter_model.safetensors")
    row = tensors[f"{TABLE}.token_adapter.trainable_tokens_delta"]
    table = tensors[f"{TABLE}.token_adapter.base_layer.weight"]
    assert table.shape[0] == size + 1
    assert np.abs(row - table[size:]).max() > 1e-3
    # transformers appends a zero to the bias of a tied head.
    bias = tensors["base_model.model.cls.predictions.decoder.token_adapter.base_layer.bias"]
    np.testing.assert_array_equal(bias[size:], 0)


def test_evaluation_masks_are_fixed(run, encoder):
    result = run(max_steps=2, learning_rate=1e-30)
    assert result.eval_loss == pytest.approx(result.eval_loss_before, rel=1e-6)


def test_a_stopped_run_continues_bit_for_bit(run, crash_at, metrics_of):
    whole = run("whole", **LORA)
    crash_at(3)
    with pytest.raises(RuntimeError, match="deliberate"):
        run("cut", save_strategy=None, save_steps=2, **LORA)
    crash_at(None)
    cut = run("cut", save_strategy=None, save_steps=2, resume_from_checkpoint=True, **LORA)
    tensors = [load_file(each.output_dir / "adapter_model.safetensors") for each in (whole, cut)]
    for name, tensor in tensors[0].items():
        np.testing.assert_array_equal(tensor, tensors[1][name], err_msg=name)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(run, metrics_of, accumulation):
    whole = metrics_of(run("whole", max_steps=2).output_dir)
    cut = run(
        "cut",
        max_steps=2,
        micro_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    for one, other in zip(whole, metrics_of(cut.output_dir), strict=True):
        if "loss" in one:
            assert one["trained_tokens"] == other["trained_tokens"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)  # another order of sums


def test_what_does_not_fit_is_refused(run, base):
    with pytest.raises(UserError, match=r"objective: clm does not fit .*expected mlm"):
        run(objective="clm")
    with pytest.raises(UserError, match=r"objective: mlm does not fit .*expected clm"):
        run(base_model=str(base))
    with pytest.raises(UserError, match=r"sequence_len: 128 is more than the 64 positions"):
        run(sequence_len=128)


def test_an_encoder_does_not_generate(encoder):
    with pytest.raises(UserError, match="does not write text"):
        load(encoder)
