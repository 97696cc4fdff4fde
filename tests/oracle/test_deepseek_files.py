"""Tensors of DeepSeek's files that the model has no use for, and those it keeps precise."""

import numpy as np
import pytest
from family_cases import CASES

from jaxlora.checkpoints.load import check_weights, load_params, read_model_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten

pytest.importorskip("torch")


def test_layers_that_guess_further_tokens_are_left_out(make_case, tmp_path):
    from safetensors.numpy import load_file, save_file

    pair = make_case(CASES["deepseek-v3"])
    pair.torch_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    layers = pair.cfg.num_layers
    tensors[f"model.layers.{layers}.enorm.weight"] = np.ones(24, np.float32)
    save_file(tensors, file, {"format": "pt"})
    cfg, _ = read_model_config(tmp_path)
    params = load_params(tmp_path, cfg, dtype="bfloat16")
    # What chooses experts is as precise as in the file, whatever the weights are.
    dtypes = {path.rpartition("/")[2]: leaf.dtype for path, leaf in flatten(params).items()}
    assert (dtypes["correction"], dtypes["kernel"]) == ("float32", "bfloat16")
    tensors[f"model.layers.{layers + 1}.enorm.weight"] = np.ones(24, np.float32)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"layers\.{layers + 1}\.enorm\.weight has no place"):
        check_weights(tmp_path, cfg)
