import random
import string

import pytest
from minimal_configs import LORA, MINIMAL

from jaxlora.config.datasets import (
    BnbConfig,
    DatasetConfig,
    LoftqConfig,
    MeshConfig,
    PeftConfig,
    PromptFormat,
    SpecialTokens,
)
from jaxlora.config.keys import DATASET_REFUSED, IMPLIED, MAPPED, NO_OP, REFUSED
from jaxlora.config.load import load_config
from jaxlora.config.schema import Config
from jaxlora.config.wording import expected
from jaxlora.core.errors import UserError


def error_of(values):
    with pytest.raises(UserError) as error:
        load_config(values)
    return str(error.value)


def test_every_problem_of_a_file_is_reported_at_once():
    values = LORA | {"lora_rr": 1, "qat": {"x": 1}, "micro_batch_size": 0, "warmup_steps": -0.1}
    values |= {"load_in_4bit": True, "load_in_8bit": True, "bf16": "maybe"}
    values["datasets"] = [{"type": "sharegpt"}, 3]
    lines = error_of(values).splitlines()
    top = {"lora_rr", "qat", "micro_batch_size", "warmup_steps", "load_in_8bit", "bf16"}
    nested = {"datasets[0].path", "datasets[0].type", "datasets[1]"}
    assert {line.split(": ")[1] for line in lines} == top | nested
    assert len(lines) == 9


def test_missing_keys_are_named():
    assert [line.split(": ")[1] for line in error_of({}).splitlines()] == [
        "base_model",
        "learning_rate",
        "datasets",
    ]


@pytest.mark.parametrize(
    ("values", "suggestion"),
    [
        ({"lora_rank": 8}, '"lora_r"'),
        ({"lerning_rate": 1}, '"learning_rate"'),
        ({"context_parapllel_size": 2}, '"context_parallel_size"'),
        ({"flash_attentoin": True}, '"flash_attention"'),
        ({"field_messages": "x"}, "belongs under datasets"),
        ({"pad_token": "x"}, "belongs under special_tokens"),
        ({"foreign": {}}, "unknown key"),
        ({"datasets": [{"path": "x", "type": "alpaca", "splt": "x"}]}, '"split"'),
        ({"datasets": [{"path": "x", "type": {"field_inptu": "x"}}]}, '"field_input"'),
        ({"datasets": [{"path": "x", "type": "alpaca", "lora_r": 8}]}, "at the top level"),
        ({"mesh": {"tensr": 2}}, '"tensor"'),
        ({"lr_scheduler": "cosin"}, '"cosine"'),
        ({"optimizer": "adafacto"}, '"adafactor"'),
        ({7: 1}, "unknown key"),
    ],
)
def test_unknown_word_is_refused_with_a_suggestion(values, suggestion):
    message = error_of(MINIMAL | values)
    assert suggestion in message
    assert "\n" not in message


def mistyped(name, rng):
    """One or two random edits: a letter dropped, added, changed, or two swapped."""
    for _ in range(rng.choice((1, 2))):
        i, letter = rng.randrange(len(name)), rng.choice(string.ascii_lowercase)
        head, tail = name[:i], name[i:]
        edits = (tail[1:], letter + tail, letter + tail[1:], tail[1:2] + tail[:1] + tail[2:])
        name = head + rng.choice(edits)
    return name


def test_typos_of_any_key_are_refused_and_suggest_it():
    rng = random.Random(0)
    known = [*(set(Config.model_fields) - {"foreign"}), *NO_OP, *REFUSED, *MAPPED, *IMPLIED]
    known = sorted(name for name in known if len(name) > 4)
    typos = [(name, mistyped(name, rng)) for name in rng.choices(known, k=220)]
    typos = [(name, typo) for name, typo in typos if typo not in known]
    right = [f'Did you mean "{name}"?' in error_of(MINIMAL | {typo: 1}) for name, typo in typos]
    assert len(right) >= 200
    # A typo can be as near to another key, such as fp16 and bf16.
    assert sum(right) >= 0.95 * len(right)


NESTED = {
    "datasets": (lambda entry: [MINIMAL["datasets"][0] | entry], DatasetConfig),
    "test_datasets": (lambda entry: [MINIMAL["datasets"][0] | entry], DatasetConfig),
    "datasets type": (lambda entry: [{"path": "x", "type": entry}], PromptFormat),
    "special_tokens": (lambda entry: entry, SpecialTokens),
    "mesh": (lambda entry: entry, MeshConfig),
    "bnb_config_kwargs": (lambda entry: entry, BnbConfig),
    "peft": (lambda entry: entry, PeftConfig),
    "peft loftq": (lambda entry: {"loftq_config": entry}, LoftqConfig),
}


def test_typos_of_any_nested_key_are_refused_and_suggest_it():
    rng, right = random.Random(0), []
    for place, (wrap, section) in NESTED.items():
        names = [name for name in section.model_fields if len(name) > 4]
        for name in rng.choices(names, k=100):
            if (typo := mistyped(name, rng)) not in section.model_fields:
                message = error_of(MINIMAL | {place.split()[0]: wrap({typo: "x"})})
                right.append(f'Did you mean "{name}"?' in message)
    assert len(right) >= 700
    # bos_token and eos_token are one edit apart.
    assert sum(right) >= 0.95 * len(right)


def test_every_key_in_a_wrong_section_is_refused_and_its_section_named():
    known = {*Config.model_fields, *NO_OP, *REFUSED, *MAPPED, *IMPLIED}
    down = [
        (place, name)
        for place, (_, section) in NESTED.items()
        for name in set(section.model_fields) - known
    ]
    for place, name in down:
        # data_files, split and others are keys of several sections.
        message = error_of(MINIMAL | {name: 1})
        assert "it belongs under " in message, (place, name)
    up = 0
    for place, (wrap, section) in NESTED.items():
        for name in set(Config.model_fields) - {"foreign"} - set(section.model_fields):
            message = error_of(MINIMAL | {place.split()[0]: wrap({name: 1})})
            # A data set of Axolotl has a seed of its own, which is refused for another reason.
            assert name in DATASET_REFUSED or "key here; it belongs " in message, (place, name)
            up += 1
    assert len(down) > 40
    assert up > 500


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "many", [1.5]])
def test_numeric_keys_refuse_what_is_no_number_in_range(value):
    numeric = [
        name
        for name, field in Config.model_fields.items()
        if field.annotation in (int, float, int | None, float | None) or "Ge(" in str(field)
    ]
    assert len(numeric) > 10
    for name in numeric:
        assert f": {name}: expected" in error_of(LORA | {name: value}), name


# What the ends of the ranges are for. Whatever else is 0 or 1e9 is refused by name.
ZERO = """adam_beta1 adam_beta2 cosine_constant_lr_ratio cosine_min_lr_ratio evals_per_epoch
    lora_dropout max_bad_rows max_grad_norm min_sample_len saves_per_epoch seed stall_timeout
    val_set_size warmup_ratio warmup_steps weight_decay""".split()
BILLION = """adam_epsilon eval_steps lora_alpha loraplus_lr_embedding loraplus_lr_ratio
    loss_watchdog_threshold max_grad_norm num_epochs save_steps stall_timeout val_set_size
    warmup_steps weight_decay""".split()


@pytest.mark.parametrize(("value", "allowed"), [(0, ZERO), (1e9, BILLION), (10**9, BILLION)])
def test_numeric_keys_take_the_ends_of_a_range_where_they_mean_something(value, allowed):
    taken = []
    for name, field in Config.model_fields.items():
        words = expected(field.annotation, field.metadata)
        if "number" not in words or "list" in words or "mapping" in words:
            continue
        try:
            load_config(LORA | {"datasets": MINIMAL["datasets"], name: value})
        except UserError as error:
            # A rule with another key says no: in range by itself.
            taken += [name] if f": {name}: expected" not in str(error) else []
        else:
            taken.append(name)
    assert set(taken) == set(allowed), value


def test_null_is_the_default_and_numbers_in_quotes_are_read_only_where_fractions_are():
    defaults = load_config(LORA)
    for name, field in Config.model_fields.items():
        words = expected(field.annotation, field.metadata)
        if "number" not in words or "list" in words or "mapping" in words:
            continue
        if not field.is_required() and name not in LORA:
            assert getattr(load_config(LORA | {name: None}), name) == getattr(defaults, name)
        if words.startswith("a whole number"):
            assert f": {name}: expected" in error_of(LORA | {name: "3.7"}), name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequence_len", 1),
        ("lora_dropout", 1.0),
        ("learning_rate", 0),
        ("max_steps", 0),
        ("num_epochs", 0),
        ("micro_batch_size", 1_000_000_000),
        ("micro_batch_size", "4"),
        ("micro_batch_size", 4.0),
        ("sample_packing", 1),
        ("sample_packing", "yes"),
        ("output_dir", ""),
        ("output_dir", 1.1),
        ("mesh", {"fsdp": -2}),
        ("mesh", {"fsdp": 0}),
        ("mesh", {"fsdp": -1, "data": -1}),
        ("mesh", 4),
        ("datasets", "data.jsonl"),
        ("datasets", []),
    ],
)
def test_value_out_of_range_is_refused_by_name(key, value):
    message = error_of(MINIMAL | {key: value})
    assert key in message
    assert "\n" not in message


def test_quoted_numbers_and_numeric_names_are_read():
    config = load_config(MINIMAL | {"learning_rate": "2e-5", "wandb_name": 7})
    assert config.learning_rate == 2e-5
    assert config.wandb_name == "7"


def test_axolotls_kernels_of_the_hub_are_the_fastest_attention_here():
    kernel = {"attn_implementation": "kernels-community/vllm-flash-attn3"}
    assert load_config(MINIMAL | kernel).attn_implementation == "auto"


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (1, -1, 1, 1, 1)),
        ({"fsdp": 4}, (-1, 4, 1, 1, 1)),
        ({"data": 4}, (4, -1, 1, 1, 1)),
        ({"data": -1}, (-1, 1, 1, 1, 1)),
        ({"tensor": 2}, (1, -1, 2, 1, 1)),
        ({"context": 2}, (1, -1, 1, 2, 1)),
        ({"expert": 2, "fsdp": 4}, (-1, 4, 1, 1, 2)),
        ({"data": 2, "fsdp": 2}, (2, 2, 1, 1, 1)),
        ({"tensor": -1}, (1, 1, -1, 1, 1)),
    ],
)
def test_devices_that_are_left_go_to_one_axis(given, sizes):
    mesh = load_config(MINIMAL | {"mesh": given}).mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor, mesh.context, mesh.expert) == sizes
