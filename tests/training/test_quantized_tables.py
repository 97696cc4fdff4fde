"""Embedding and head of a quantized base in int8, from the key to the merged model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlora
from jaxlora.checkpoints.peft_records import trained_storage
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.generation.model import load
from jaxlora.ops.arrays import LoraArray, QuantizedArray
from jaxlora.ops.quantize import dequantize, quantize_tokens
from jaxlora.training.setup import make_plan
from jaxlora.training.state import load_weights

INT8 = {"adapter": "qlora", "quantization": "int4", "quantize_embeddings": "int8"}
EMBEDDING, HEAD = "embed/embedding", "lm_head/kernel"


def weights(keys, tmp_path, **changes):
    plan = make_plan(load_config({**keys, **INT8, "output_dir": str(tmp_path / "o"), **changes}))
    return load_weights(plan.config, plan.model)


def assert_is(leaf, table, axis):
    """`leaf` stores `table`, read from the files of the base, in int8."""
    wanted = quantize_tokens(table, axis)
    assert isinstance(leaf, QuantizedArray)
    np.testing.assert_array_equal(leaf.values, wanted.values)
    np.testing.assert_array_equal(leaf.scales, wanted.scales)


def test_frozen_tables_are_stored_in_8_bits(keys, base, tmp_path):
    _, frozen = weights(keys, tmp_path)
    tensors = load_file(base / "model.safetensors")
    assert_is(frozen[EMBEDDING], tensors["model.embed_tokens.weight"], 0)
    assert_is(frozen[HEAD], tensors["lm_head.weight"].T, 1)
    assert frozen["norm/scale"].dtype == jnp.float32


def test_a_head_that_shares_the_table_shares_its_codes(keys, write_base, tmp_path):
    tied = write_base(tmp_path / "tied", tie_word_embeddings=True)
    table = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    _, frozen = weights(keys, tmp_path, base_model=str(tied))
    assert_is(frozen[EMBEDDING], table, 0)
    assert HEAD not in frozen
    # An adapter on the head alone gives it numbers of its own: the same ones.
    _, frozen = weights(
        keys,
        tmp_path,
        base_model=str(tied),
        lora_target_linear=False,
        lora_target_modules=["lm_head"],
    )
    assert_is(frozen[HEAD], table.T, 1)


def test_what_trains_of_the_tables_stays_as_it_is(keys, base, tmp_path):
    trainable, frozen = weights(keys, tmp_path, lora_modules_to_save=["lm_head"])
    assert trainable["params"][HEAD].dtype == jnp.float32
    assert HEAD not in frozen
    assert isinstance(frozen[EMBEDDING], QuantizedArray)
    rows = {"peft_trainable_token_indices": [3, 5]}
    trainable, frozen = weights(keys, tmp_path, **rows)
    assert frozen[EMBEDDING].base.dtype == jnp.float32
    assert isinstance(frozen[HEAD], QuantizedArray)


def test_tables_grow_before_they_are_quantized(keys, base, tmp_path):
    grown = {"special_tokens": {"pad_token": "<fill>"}, "mean_resizing_embeddings": True}
    _, frozen = weights(keys, tmp_path, **grown)
    tensors = load_file(base / "model.safetensors")
    for path, name, axis in ((EMBEDDING, "model.embed_tokens", 0), (HEAD, "lm_head", 1)):
        table = tensors[f"{name}.weight"]
        mean = table.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
        table = np.concatenate([table, mean])
        assert_is(frozen[path], table.T if axis else table, axis)


def test_the_adapter_remembers_and_merging_and_resuming_ask(run, base, tmp_path):
    folder = run("run", **INT8, save_steps=2, save_strategy=None).output_dir
    assert trained_storage(folder).embeddings == "int8"
    leaves = flatten(load(folder).params)
    held = [x.base if isinstance(x, LoraArray) else x for x in (leaves[EMBEDDING], leaves[HEAD])]
    assert all(isinstance(leaf, QuantizedArray) for leaf in held)
    tensors = load_file(base / "model.safetensors")
    plain = load_file(jaxlora.merge(folder, None, tmp_path / "m") / "model.safetensors")
    np.testing.assert_array_equal(plain["lm_head.weight"], tensors["lm_head.weight"])
    merged = jaxlora.merge(folder, None, tmp_path / "trained", quantization="trained")
    simulated = load_file(merged / "model.safetensors")
    for name, axis in (("model.embed_tokens.weight", 0), ("lm_head.weight", 0)):
        wanted = dequantize(jax.tree.map(jnp.asarray, quantize_tokens(tensors[name], axis)))
        np.testing.assert_array_equal(simulated[name], wanted)
    checkpoint = next((folder / "checkpoints").glob("*2"))
    plain_tables = {**INT8, "quantize_embeddings": None}
    with pytest.raises(UserError, match="quantize_embeddings was 'int8'"):
        run("other", **plain_tables, resume_from_checkpoint=str(checkpoint))


def test_a_plain_base_has_no_tables_in_8_bits(keys):
    with pytest.raises(UserError, match="quantize_embeddings: int8 needs a quantized base"):
        load_config({**keys, "quantize_embeddings": "int8"})
