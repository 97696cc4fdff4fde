"""Runs on two devices are those of one: what trains whole, also of an odd size; classifiers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora.checkpoints.load import read_model_config

PROGRAM = "import json, sys, jaxlora; jaxlora.train(json.loads(sys.argv[1]), quiet=True)"
NEW = {"tokens": [" cat", "<later>"], "special_tokens": {"pad_token": "<fill>"}}
CASES = (
    "rows, tensor",
    "whole, fsdp",
    "whole, old size, tensor",
    "linear, fsdp",
    "linear, tensor",
    "linear, context",
)
WHOLE = {"lora_modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}
# A whole stack, one layer of another, all norms of the layers.
LINEAR = {
    "lora_target_linear": None,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_modules_to_save": ["down_proj", "1.mlp.up_proj", "post_attention_layernorm"],
}


def train_on_two(keys):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(keys)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_what_trains_on_two_devices_is_that_of_one(case, base, keys, run, metrics_of, tmp_path):
    size = read_model_config(base)[0].vocab_size
    rows = {"peft_trainable_token_indices": {"embed_tokens": [size + 1], "lm_head": [5, size + 1]}}
    kinds = {"rows": rows | {"tokens": NEW["tokens"][:1]}, "whole": WHOLE, "linear": LINEAR}
    kind = case.partition(",")[0]
    train = kinds[kind]
    changes = (
        ({} if "old" in case or kind == "linear" else NEW)
        | train
        | {"max_steps": 3, "learning_rate": 1e-3, "val_set_size": 4, "eval_steps": 2}
    )
    run("one", **changes)
    axis = case.rpartition(", ")[2]
    replicas = 2 if axis == "fsdp" else 1
    on_two = {"mesh": {"fsdp": 1, axis: 2}, "micro_batch_size": 4 // replicas}
    train_on_two({**keys, **changes, **on_two, "output_dir": str(tmp_path / "two")})
    check_two(tmp_path, metrics_of)


@pytest.mark.oracle
@pytest.mark.parametrize(("axis", "replicas"), [("data", 2), ("tensor", 1)])
def test_a_classifier_on_two_devices_is_that_of_one(
    axis, replicas, keys, run, metrics_of, tmp_path
):
    """Three labels, which do not divide by two; the last batch of held-out texts is not full."""
    nouns = ["cat", "dog", "river"] * 5
    rows = [{"text": f"the {noun} {i}", "label": noun} for i, noun in enumerate(nouns)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"path": str(tmp_path / "texts.jsonl"), "type": "classification"}]
    changes = {"datasets": data, "num_labels": 3, "val_set_size": 5, "evals_per_epoch": 1}
    changes |= {"max_steps": 3, "learning_rate": 1e-3}
    one = run("one", **changes)
    on_two = {"mesh": {"fsdp": 1, axis: 2}, "micro_batch_size": 4 // replicas}
    train_on_two({**keys, **changes, **on_two, "output_dir": str(tmp_path / "two")})
    check_two(tmp_path, metrics_of)
    held_out = [
        [r["eval_accuracy"] for r in metrics_of(tmp_path / name) if "eval_accuracy" in r]
        for name in ("one", "two")
    ]
    assert held_out[0][-1] == one.accuracy
    assert held_out[0] == held_out[1]


def check_two(tmp_path, metrics_of):
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for key, count in (("loss", 3), ("eval_loss", 1)):
        losses = [[r[key] for r in records if key in r] for records in (one, two)]
        assert len(losses[0]) >= count
        np.testing.assert_allclose(*losses, rtol=1e-5)  # float32, sums in another order
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for key, values in one.items():
        # An update is about the learning rate, whatever the gradient; AdamW's first steps carry
        # rounding of gradients near zero into it.
        np.testing.assert_allclose(values, two[key], atol=2e-4, err_msg=key)
