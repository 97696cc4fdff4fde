"""`benchmarks/gpu.py` runs from end to end, on a model that fits in a pocket."""

import json
import sys

import gpu
import gpu_checks
import gpu_model
import jax
import numpy as np
import pytest

from jaxlora.ops.quantize import dequantize


def test_cells_are_measured_and_make_a_table(tmp_path, monkeypatch):
    output = tmp_path / "gpu.json"
    cases = {"tiny:nf4": [(2, 32, "matmuls")], "tiny:none": [(2, 32, "full")]}
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.run(cases, seconds=300, output=output)
    result = json.loads(output.read_text())
    (cell,) = result["cells"]
    assert cell["tokens_per_s"] == pytest.approx(64 / np.median(cell["step_s"]), rel=0.01)
    # Random tokens of 128, before the first step.
    assert cell["loss"][0] == pytest.approx(np.log(128), abs=0.3)
    assert cell["loss"][1] < cell["loss"][0]
    assert cell["compiler_bytes"]["total"] > cell["compiler_bytes"]["argument"] > 100_000
    # LoRA has no gradient of the base: 4 of 6 FLOPs, but for attention and the adapter.
    assert 1.2 < cell["flops_per_s_6p"] / cell["flops_per_s"] < 1.5
    assert "tiny:none" in result["broke_off"]
    assert f"| tiny | nf4 | 2 x 32 | matmuls | {cell['tokens_per_s']:,} |" in gpu.table(result)


@pytest.mark.parametrize("storage", ["bf16", "nf4", "int4", "int8"])
def test_random_weights_are_of_the_size_of_trained_ones(storage):
    subject = gpu_model.make_subject("tiny", storage, "float32")
    leaf = subject.frozen["layers/mlp/up_proj/kernel"]
    matrix = leaf if storage == "bf16" else jax.jit(dequantize)(leaf)
    assert matrix.shape == (2, 64, 128)
    assert 0.01 < np.std(matrix) < 0.04
    assert subject.adapter_size == 16 * 2 * (4 * 64 + 2 * 96 + 3 * 192)


def test_checks_find_no_error_here_either():
    found = [each for each in gpu_checks.attention_errors(["packed"]) if "errors" in each]
    assert {each["backend"] for each in found} == {"reference", "chunked"}
    assert all(max(each["errors"]) < 0.01 for each in found)
