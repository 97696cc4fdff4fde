"""`inspect` tells what a folder holds, in numbers counted here by hand from the files."""

import json

import pytest
from safetensors.numpy import load_file
from tiny_runs import ASSETS, tiny_run

from jaxlora.core.errors import UserError
from jaxlora.inspection import inspect


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_tiny_llama):
    return tiny_run(tmp_path_factory, write_tiny_llama)


def trained(run):
    tensors = load_file(run.folder / "adapter_model.safetensors")
    return sum(values.size for values in tensors.values())


def test_parameters_of_a_model_are_those_of_its_file(run):
    rows = dict(inspect(run.base))
    tensors = load_file(run.base / "model.safetensors")
    total = sum(values.size for values in tensors.values())
    linear = sum(values.size for name, values in tensors.items() if "_proj" in name)
    assert f"{total:,}" in rows["parameters"]
    assert f"{linear:,}" in rows["parameters"]
    assert "LlamaForCausalLM" in rows["model"]
    assert f"{len(tensors)} F32 in 1 file" in rows["weights"]


def test_targets_of_a_model_are_its_linear_layers(run):
    (targets,) = [value for name, value in inspect(run.base) if "targets" in name]
    letters = ("down", "gate", "k", "o", "q", "up", "v")
    assert targets == ", ".join(f"{letter}_proj" for letter in letters)


def test_the_promised_lora_size_is_that_of_a_run(run):
    """The run has rank 4 on all linear layers; the row promises rank 16."""
    (promised,) = [value for name, value in inspect(run.base) if "r=16" in name]
    assert promised == f"{4 * trained(run):,}"


def test_memory_falls_with_the_bits(run):
    (memory,) = [value for name, value in inspect(ASSETS / "tiny-llama") if "memory" in name]
    sizes = dict(part.split()[:2] for part in memory.split(", "))
    assert float(sizes["int8"]) < float(sizes["bfloat16"])
    assert float(sizes["nf4"]) <= float(sizes["int4"]) < float(sizes["int8"])


def test_run_folder_shows_adapter_and_checkpoint(run):
    rows = dict(inspect(run.folder))
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert str(run.folder) in rows["adapter"]
    assert f"r {config['r']}" in rows["adapter"]
    assert rows["base"] == str(run.base)
    assert rows["trained parameters"] == f"{trained(run):,}"
    assert rows["checkpoints"].split(", ")[-1] == str(run.keys["max_steps"])


@pytest.mark.parametrize("part", ["checkpoints", "checkpoints/checkpoint-3"])
def test_a_checkpoint_holds_the_adapter_and_its_moments(part, run):
    rows = dict(inspect(run.folder / part))
    (held,) = [value for name, value in rows.items() if name.startswith("trained")]
    assert held.split()[0] == f"{trained(run):,}"
    moments = int(rows["optimizer state"].split()[0].replace(",", ""))
    # Adam: two moments of every number, and a handful of counters.
    assert 0 <= moments - 2 * trained(run) < 10


def test_nothing_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to inspect"):
        inspect(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        inspect(tmp_path / "nowhere")
