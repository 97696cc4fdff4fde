"""`jaxlora bench`: numbers that follow from what was timed, and a run that leaves nothing."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_runs import PROMPT, SIZES, write_base, write_rows

from jaxlora.cli import main
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.measuring.bench import Measured, bench, sequence_lengths
from jaxlora.measuring.report import describe, plot
from jaxlora.training.setup import make_plan


@pytest.fixture(scope="module")
def keys(tmp_path_factory, write_tiny_llama) -> dict:
    root = tmp_path_factory.mktemp("bench")
    return {
        "base_model": str(write_base(write_tiny_llama, root / "base")),
        "datasets": [{"path": str(write_rows(root / "rows.jsonl", 24)), "type": PROMPT}],
        "dataset_prepared_path": str(root / "prepared"),
        "output_dir": str(root / "run"),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 64,
        "sample_packing": True,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": 8,
    }


@pytest.fixture(scope="module")
def measured(keys) -> Measured:
    return bench(load_config(keys), steps=3)


def test_tokens_are_those_of_the_batches_without_padding(keys, measured):
    batches = make_plan(load_config(keys)).batches
    timed = [batches.batch(number) for number in (3, 4, 5)]  # after one that compiles, two warm
    tokens = sum(np.count_nonzero(batch["segment_ids"]) for batch in timed)
    trained = sum(batch["weights"].sum() for batch in timed)
    assert measured.trained_per_s / measured.tokens_per_s == pytest.approx(trained / tokens)


def test_arithmetic_is_four_for_each_frozen_weight_and_six_for_each_trained_one(keys, measured):
    """performance.md 2.1, written out: 4 (P_lin + P_head) + 3 F_attn + 6 P_lora."""
    width, hidden, layers, rank = SIZES["hidden_size"], SIZES["intermediate_size"], 2, 4
    heads, kv_heads, head = 4, 2, SIZES["head_dim"]
    shapes = [(width, heads * head), (width, kv_heads * head), (width, kv_heads * head)]
    shapes += [(heads * head, width), (width, hidden), (width, hidden), (hidden, width)]
    linear = layers * sum(a * b for a, b in shapes)
    pairs = layers * sum(rank * (a + b) for a, b in shapes)
    batches = make_plan(load_config(keys)).batches
    lengths = np.concatenate(
        [sequence_lengths(batches.batch(number)["segment_ids"]) for number in (3, 4, 5)]
    )
    seen = round(float((lengths.astype(float) ** 2).sum() / lengths.sum()))
    attention = 2 * layers * heads * head * seen
    expected = 4 * (linear + SIZES["vocab_size"] * width) + 3 * attention + 6 * pairs
    assert measured.flops_per_token == pytest.approx(expected, rel=1e-9)


def test_parts_of_a_step_make_up_the_step(measured):
    assert sum(measured.seconds.values()) == pytest.approx(measured.step_s, rel=0.5)  # of medians
    assert 0 < measured.step_s <= measured.step_worst_s
    assert all(seconds >= 0 for seconds in measured.seconds.values())
    assert measured.memory.planned > 1024 * 64 * 4  # the embedding alone
    assert measured.memory.peak > measured.memory.planned


def test_shares_of_the_peak_follow_from_the_rate(measured):
    assert measured.mfu is None, "a CPU has no data sheet"
    found = dataclasses.replace(
        measured,
        tokens_per_s=1000.0,
        flops_per_token=4e9,
        peak_flops_per_s=8e12,
        matmul_flops_per_s=5e12,
    )
    assert (found.mfu, found.matmul_share) == (0.5, 0.8)
    assert "50.0% of the data sheet's 8.0 TFLOP/s; 80.0% of the 5.0 TFLOP/s" in describe(found)


def test_the_output_folder_is_not_touched(keys, measured, tmp_path):
    assert not (tmp_path / "run").exists()
    picture = tmp_path / "bench.png"
    plot(measured, picture, "tiny")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--output: .* cannot be written"):
        plot(measured, tmp_path / "no" / "bench.png", "tiny")


def test_the_command_prints_json_and_draws_a_picture(keys, measured, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxlora.measuring.bench.bench", lambda config, **options: measured)
    (tmp_path / "my.yml").write_text(json.dumps(keys))
    assert main(["bench", "my.yml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == measured.to_dict()
    assert (tmp_path / "my-bench.png").exists()


def test_a_number_of_steps_that_is_none_is_refused(keys):
    with pytest.raises(UserError, match="--steps: 0"):
        bench(load_config(keys), steps=0)
