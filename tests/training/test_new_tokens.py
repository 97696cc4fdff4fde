"""New tokens from `train` over resume, export and merge to `generate`."""

import json

import numpy as np
import pytest
from gguf_writing import byte_level
from safetensors.numpy import load_file

import jaxlora
from jaxlora.checkpoints.adapter import read_adapter
from jaxlora.checkpoints.fitted import load_base
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.data.tokenizer import load_tokenizer
from jaxlora.generation.probe import probe_logits
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.training.setup import make_plan
from jaxlora.training.state import load_weights

WHOLE = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
# Two more tokens than the tiny base has rows; "cat" is a word of the data.
NEW = {"tokens": [" cat", "<later>"], "special_tokens": {"pad_token": "<fill>"}}
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.fixture(scope="module")
def size(base):
    """Tokens, and rows, of the base."""
    cfg, _ = read_model_config(base)
    assert len(load_tokenizer(base)) == cfg.vocab_size
    return cfg.vocab_size


def adapter_file(folder):
    return load_file(folder / "adapter_model.safetensors")


def base_file(folder):
    return load_file(folder / "model.safetensors")


def logits_of(base, adapter_folder):
    stored, _ = read_model_config(base)
    adapter = read_adapter(adapter_folder, stored)
    params = load_base(base, stored, adapter.cfg, dtype="float32", trained=adapter.parts)
    return probe_logits(adapter.cfg, adapter.on(params))


def test_new_tokens_are_learned_beside_an_adapter(base, size, run, tmp_path):
    changes = {**NEW, **WHOLE, "save_steps": 3, "save_strategy": None}
    run("run", **changes)
    folder, old = tmp_path / "run", base_file(base)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids(["<fill>", " cat", "<later>"]) == [
        *range(size, size + 3)
    ]
    tensors = adapter_file(folder)
    table = tensors[f"{EMBEDDING}.weight"]
    assert table.shape[0] == tensors["base_model.model.lm_head.weight"].shape[0] == size + 3
    # The word that the data has moves its row; the token that it lacks does not.
    start = adapter_file_of_no_steps(run, tmp_path, changes)[f"{EMBEDDING}.weight"]
    np.testing.assert_array_equal(start[:size], old["model.embed_tokens.weight"])
    moved = np.abs(table - start).max(axis=1)
    assert moved[size + 1] > 1e-3
    assert moved[size + 2] == moved[size] == 0

    exported = tmp_path / "exported"
    jaxlora.export(folder, exported)
    for key, values in adapter_file(exported).items():
        np.testing.assert_array_equal(values, tensors[key], err_msg=key)
    checkpoint = next((folder / "checkpoints").glob("*3"))
    run("again", **changes, resume_from_checkpoint=str(checkpoint))
    for key, values in adapter_file(tmp_path / "again").items():
        np.testing.assert_array_equal(values, tensors[key], err_msg=key)
    with pytest.raises(UserError, match="mean_resizing_embeddings was False"):
        run(
            "mean", **changes, mean_resizing_embeddings=True, resume_from_checkpoint=str(checkpoint)
        )

    merged = jaxlora.merge(exported, None, tmp_path / "merged", dtype="float32")
    cfg, raw = read_model_config(merged)
    assert raw["vocab_size"] == size + 3
    assert load_tokenizer(merged).get_vocab() == tokenizer.get_vocab()
    # float32, the low-rank product summed first or last.
    np.testing.assert_allclose(
        probe_logits(cfg, load_params(merged, cfg, dtype="float32")),
        logits_of(base, exported),
        atol=2e-5,
    )
    assert len(jaxlora.generate(folder, ["one cat<later>"], max_new_tokens=2)) == 1
    assert len(jaxlora.generate(merged, ["one cat<later>"], max_new_tokens=2)) == 1


def adapter_file_of_no_steps(run, tmp_path, changes):
    """What such a run starts from: a learning rate that leaves float32 numbers alone."""
    run("start", **changes, learning_rate=1e-30, max_steps=1)
    return adapter_file(tmp_path / "start")


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.oracle), True])
def test_only_the_rows_of_new_tokens_move(tied, base, size, run, tmp_path, write_base):
    home = write_base(tmp_path / "base", tie_word_embeddings=True) if tied else base
    rows = {"peft_trainable_token_indices": [size + 1, size + 2]}
    changes = {**NEW, **rows, "base_model": str(home), "mean_resizing_embeddings": True}
    run("run", **changes)
    tensors, old = adapter_file(tmp_path / "run"), base_file(home)["model.embed_tokens.weight"]
    table = tensors[f"{EMBEDDING}.token_adapter.base_layer.weight"]
    np.testing.assert_array_equal(table[:size], old)
    mean = np.broadcast_to(old.mean(axis=0, dtype=np.float64), table[size:].shape)
    np.testing.assert_allclose(table[size:], mean, atol=1e-7)  # float32 numbers below 1
    moved = tensors[f"{EMBEDDING}.token_adapter.trainable_tokens_delta"]
    assert np.abs(moved - mean[1:]).max(axis=1)[0] > 1e-3
    # Where the head is the embedding, every token is a wrong answer to learn from.
    assert (np.abs(moved - mean[1:]).max(axis=1)[1] > 1e-3) == tied
    tables = 1 if tied else 2
    said = f"{size + 3:,} tokens; with {tables} table(s)"
    assert ("vocabulary", said) in jaxlora.inspect(tmp_path / "run")
    # As a start of another run, whose tokenizer is the adapter's.
    further = {**changes, "lora_model_dir": str(tmp_path / "run"), "learning_rate": 1e-30}
    run("further", **{**further, "tokens": None}, max_steps=1)
    for key, values in adapter_file(tmp_path / "further").items():
        np.testing.assert_array_equal(values, tensors[key], err_msg=key)
    again = load_tokenizer(tmp_path / "further")
    assert again.get_vocab() == load_tokenizer(tmp_path / "run").get_vocab()


def test_full_fine_tuning_exports_the_larger_model(base, size, run, tmp_path):
    none = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_linear"))
    run("run", **none, **NEW, resize_token_embeddings_to_32x=True, learning_rate=1e-3)
    cfg, raw = read_model_config(tmp_path / "run")
    assert raw["vocab_size"] == cfg.vocab_size == -(-(size + 3) // 32) * 32
    params = load_params(tmp_path / "run", cfg, dtype="float32")
    assert params["lm_head"]["kernel"].shape[1] == cfg.vocab_size
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.convert_tokens_to_ids("<later>") == size + 2
    assert len(jaxlora.generate(tmp_path / "run", [" cat"], max_new_tokens=2)) == 1


def test_a_chat_with_new_tokens_is_evaluated_and_verified(size, keys, run, tmp_path):
    pytest.importorskip("peft")
    new = range(size, size + 3)
    changes = {
        "tokens": ["<|im_start|>", " cat"],
        "special_tokens": {"eos_token": "<|im_end|>"},
        "chat_template": "chatml",
        "peft_trainable_token_indices": {"embed_tokens": [*new], "lm_head": [*new]},
        "quantization": "int4",
        "val_set_size": 4,
        "max_steps": 2,
    }
    result = run("run", **changes)
    folder = tmp_path / "run"
    told = {**keys, **changes, "output_dir": str(tmp_path / "x")}
    # Weights went through a file of the same dtype.
    assert jaxlora.evaluate(told, adapter=folder).loss == pytest.approx(result.eval_loss, rel=1e-5)
    verdict = jaxlora.verify(folder)
    assert verdict.ok, verdict
    assert load_tokenizer(folder).chat_template
    merged = jaxlora.merge(folder, None, tmp_path / "merged")
    ends = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [load_tokenizer(folder).convert_tokens_to_ids("<|im_end|>"), 2]


def test_a_gguf_file_has_the_new_tokens(write_tiny_llama, run, tmp_path):
    pytest.importorskip("gguf")
    tokenizer = byte_level()  # the bundled one splits by a rule that llama.cpp has no name for
    size = len(tokenizer)
    folder = write_tiny_llama(tmp_path / "base", vocab_size=size)
    tokenizer.save_pretrained(folder)
    changes = {"tokens": ["<now>", "<later>"], **WHOLE, "max_steps": 1}
    run("run", **changes, base_model=str(folder), resize_token_embeddings_to_32x=True)
    file = jaxlora.merge(tmp_path / "run", None, tmp_path / "merged.gguf", gguf="F16")
    cfg, _ = read_model_config(file)
    assert cfg.vocab_size == -(-(size + 2) // 32) * 32
    merged = load_params(file, cfg, dtype="float32")
    # F16 keeps 11 bits of each weight; logits vary by about 1.
    ours = logits_of(folder, tmp_path / "run")
    np.testing.assert_allclose(probe_logits(cfg, merged), ours, atol=2e-2)
    vocabulary = load_tokenizer(file).get_vocab()
    assert {vocabulary[text] for text in changes["tokens"]} == {size, size + 1}


def test_rows_to_spare_are_taken_first(size, run, tmp_path, write_base, keys):
    roomy = write_base(tmp_path / "base", vocab_size=size + 8)
    rows = {"peft_trainable_token_indices": [size + 1, size + 2]}
    values = {**keys, **NEW, **rows, "base_model": str(roomy), "output_dir": str(tmp_path / "x")}
    plan = make_plan(load_config(values))
    assert plan.model.cfg.vocab_size == size + 8
    assert plan.model.parts["embed/embedding"].rows == (size + 1, size + 2)


def open_run(keys, tmp_path, **changes):
    plan = make_plan(load_config({**keys, "output_dir": str(tmp_path), **changes}))
    return plan, *load_weights(plan.config, plan.model)


@pytest.mark.parametrize("storage", ["nf4", "int4", "int8"])
def test_a_quantized_base_grows_in_its_plain_tables(storage, keys, size, tmp_path):
    rows = {"peft_trainable_token_indices": [size + 1, size + 2]}
    _, trainable, frozen = open_run(keys, tmp_path, **NEW, **rows, quantization=storage)
    assert isinstance(frozen["layers/mlp/up_proj/kernel"], QuantizedArray)
    assert frozen["lm_head/kernel"].shape[1] == size + 3
    assert frozen["embed/embedding"].base.shape[0] == size + 3
    assert trainable["params"]["embed/embedding"].shape[0] == 2


def test_random_weights_have_the_new_rows(keys, size, tmp_path):
    none = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_linear"))
    values = {k: v for k, v in {**keys, **none, "reinit_weights": True}.items() if v is not None}
    _, trainable, _ = open_run(values, tmp_path, **NEW)
    assert trainable["params"]["embed/embedding"].shape[0] == size + 3


def test_a_token_that_is_there_already_is_said(base, keys, tmp_path):
    said, known = [], load_tokenizer(base).eos_token
    make_plan(load_config({**keys, "output_dir": str(tmp_path), "tokens": [known]}), said.append)
    assert f"note: tokens: {known} is in the vocabulary already" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["<a>"]}, r"tokens: embed_tokens is frozen.*\[embed_tokens, lm_head\].*{size}"),
        (
            {"tokens": ["<a>"], "lora_modules_to_save": ["embed_tokens"]},
            "tokens: lm_head is frozen",
        ),
        ({"tokens": ["<a>"], "peft_trainable_token_indices": [5]}, "tokens: embed_tokens is froz"),
        ({"special_tokens": {"eos_token": "<a>"}}, "tokens: embed_tokens is frozen"),
        (
            {"tokens": ["<a>"], "adapter": None, "unfrozen_parameters": ["lm_head"]},
            "tokens: embed_tokens is frozen.*unfrozen_parameters match model.embed_tokens.weight",
        ),
        ({"added_tokens_overrides": {99999: "<a>"}}, "added_tokens_overrides: 99999 is no added"),
    ],
)
def test_a_mistake_is_named_in_one_line(changes, message, keys, size, tmp_path):
    values = {**keys, "output_dir": str(tmp_path), **changes}
    if not values["adapter"]:
        values = {k: v for k, v in values.items() if not k.startswith(("lora_", "adapter"))}
    with pytest.raises(UserError, match=message.replace("{size}", str(size))) as caught:
        make_plan(load_config(values))
    assert "\n" not in str(caught.value)


def test_a_larger_tokenizer_needs_its_tokens_listed(base, keys, size, tmp_path):
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<a>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = {**keys, "output_dir": str(tmp_path), "tokenizer_config": str(tmp_path / "tokenizer")}
    with pytest.raises(UserError, match=rf"token id {size} .*only {size} rows.*under tokens"):
        make_plan(load_config(values))
    plan = make_plan(load_config({**values, "tokens": ["<a>"], **WHOLE}))
    assert plan.model.cfg.vocab_size == size + 1
    with pytest.raises(UserError, match="tokens: embed_tokens is frozen"):
        make_plan(load_config({**values, "tokens": ["<a>"]}))


def test_an_adapter_without_room_is_no_start_for_new_tokens(run, keys, tmp_path, size):
    run("run", max_steps=1)
    changes = {**NEW, **WHOLE, "lora_model_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=f"tokens: {size + 3} rows are needed.*merge it"):
        make_plan(load_config({**keys, **changes, "output_dir": str(tmp_path / "x")}))
