"""Tables of the vocabulary that train, on two devices: as on one, also of an odd size."""

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
CASES = ("rows, tensor", "whole, fsdp", "whole, old size, tensor")
WHOLE = {"lora_modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}


def train_on_two(keys):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(keys)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_tables_on_two_devices_are_those_of_one(case, base, keys, run, metrics_of, tmp_path):
    size = read_model_config(base)[0].vocab_size
    rows = {"peft_trainable_token_indices": {"embed_tokens": [size + 1], "lm_head": [5, size + 1]}}
    train = rows | {"tokens": NEW["tokens"][:1]} if case.startswith("rows") else WHOLE
    changes = ({} if "old" in case else NEW) | train | {"max_steps": 3, "learning_rate": 1e-3}
    run("one", **changes)
    axis, replicas = ("fsdp", 2) if "fsdp" in case else ("tensor", 1)
    on_two = {"mesh": {"fsdp": 1, axis: 2}, "micro_batch_size": 4 // replicas}
    train_on_two({**keys, **changes, **on_two, "output_dir": str(tmp_path / "two")})
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    losses = [[r["loss"] for r in records if "loss" in r] for records in (one, two)]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=1e-5)  # float32, sums in another order
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for key, values in one.items():
        # An update is about the learning rate, whatever the gradient; AdamW's first steps carry
        # rounding of gradients near zero into it.
        np.testing.assert_allclose(values, two[key], atol=2e-4, err_msg=key)
