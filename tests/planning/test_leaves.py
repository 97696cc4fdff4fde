"""What is planned is what a run will hold: same leaves, shapes, dtypes and places."""

import shutil

import jax
import pytest

import jaxlora
from jaxlora.config.load import load_config
from jaxlora.planning.program import make_program
from jaxlora.training.setup import open_model
from jaxlora.training.state import init_optimizer, load_weights, make_tx

BASE = f"{jaxlora.__path__[0]}/assets/tiny-llama"
KEYS = {
    "base_model": BASE,
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "output_dir": "out",
    "sequence_len": 64,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "max_steps": 3,
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
QLORA = {**LORA, "adapter": "qlora"}
CASES = {
    "full": {"optimizer": "adafactor"},
    "lora": {**LORA, "bf16": True, "peft_use_dora": True, "optimizer": "adamw_bnb_8bit"},
    "int4": {**QLORA, "quantization": "int4", "lora_modules_to_save": ["embed_tokens"]},
    "nf4": {
        **QLORA,
        "mu_dtype": "bfloat16",
        "load_in_4bit": True,
        "peft_trainable_token_indices": [3, 5],
    },
    "plain scales": {
        **QLORA,
        "quantization": "nf4",
        "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False},
    },
    "tables": {**QLORA, "quantization": "int4", "quantize_embeddings": "int8"},
    "int8": {**LORA, "quantization": "int8", "optimizer": "lion", "peft_lora_bias": True},
}


def held(tree):
    """``{path: (shape, dtype, sharding)}`` of every array."""
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("case", CASES)
def test_planned_arrays_are_those_of_the_run(case):
    config = load_config({**KEYS, **CASES[case]})
    program = make_program(config, jax.devices())
    model = open_model(config)
    trainable, frozen = load_weights(config, model)
    optimizer, _ = make_tx(config, trainable, model.specs, 3)
    opt_state = init_optimizer(optimizer, trainable, model.placement)
    assert held(program.frozen) == held(frozen)
    assert held(program.trainable) == held(trainable)
    assert held(program.opt_state) == held(opt_state)
    assert jax.tree.structure(program.frozen) == jax.tree.structure(frozen)


def test_planning_needs_only_config_json(tmp_path):
    shutil.copy(f"{BASE}/config.json", tmp_path)
    config = load_config({**KEYS, **QLORA, "quantization": "int4", "base_model": str(tmp_path)})
    assert make_program(config, jax.devices()).quantization.format == "int4"
