import dataclasses

import pytest
from minimal_configs import LORA, MINIMAL

from jaxlora.config.load import load_config
from jaxlora.config.settings import data_options, held_out_specs, lora_config, train_specs
from jaxlora.core.errors import UserError
from jaxlora.data.prompts import CustomPrompt
from jaxlora.data.spec import TOKENIZED, TYPES, DatasetSpec


def test_adapter_options_reach_the_lora_floor():
    extra = {"lora_dropout": 0.1, "peft_use_rslora": True, "peft_use_dora": True}
    extra |= {"lora_target_modules": ["k_proj"], "peft_layers_to_transform": 3}
    extra |= {"peft_layers_pattern": "h"}
    lora = lora_config(load_config(LORA | extra))
    assert (lora.r, lora.alpha, lora.dropout) == (8, 16.0, 0.1)
    assert (lora.target_modules, lora.layers_to_transform) == (("k_proj",), (3,))
    assert lora.layers_pattern == ("h",)
    assert lora.use_rslora
    assert lora.use_dora
    assert lora.init is True
    extra = {"lora_rank_pattern": {"q_proj": 4}, "lora_alpha_pattern": {"v_proj": 2}}
    extra |= {"lora_exclude_modules": "lm_head", "peft_init_lora_weights": "gaussian"}
    lora = lora_config(load_config(LORA | extra))
    assert (lora.rank_pattern, lora.alpha_pattern) == ({"q_proj": 4}, {"v_proj": 2})
    assert (lora.exclude_modules, lora.init) == ("lm_head", "gaussian")
    loftq = {"peft": {"loftq_config": {"loftq_bits": 8, "loftq_iter": 3}}}
    lora = lora_config(load_config(LORA | loftq))
    assert (lora.init, lora.loftq_iter) == ("loftq", 3)
    assert lora_config(load_config(MINIMAL)) is None


def test_every_type_of_the_data_floor_is_accepted():
    for kind in TYPES:
        config = load_config(MINIMAL | {"datasets": [{"path": "x", "type": kind}]})
        assert train_specs(config)[0].type == kind


@pytest.mark.parametrize("entry", [{}, {"type": None}, {"type": ""}])
def test_rows_without_a_type_are_tokens(entry):
    config = load_config(MINIMAL | {"datasets": [{"path": "x", **entry}]})
    assert train_specs(config)[0].type == TOKENIZED


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "sharegpt",
            r"three lines type: chat_template, field_messages: conversations, "
            r"message_property_mappings: \{role: from, content: value\}",
        ),
        ("sharegpt:chat", "three lines"),
        ("bradley_terry.chat_template", "preference and reward training"),
        ("alpaca_chat.load_q", 'expected one of .*Did you mean "alpaca_chat.load_qa"'),
    ],
)
def test_other_types_are_refused_with_what_to_write(kind, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(MINIMAL | {"datasets": [{"path": "x", "type": kind}]})
    assert "\n" not in str(error.value)


def test_custom_prompt_has_the_defaults_of_the_data_floor():
    config = load_config(MINIMAL | {"datasets": [{"path": "x", "type": {"field_output": "ref"}}]})
    custom = CustomPrompt.of(train_specs(config)[0].type)
    assert custom == dataclasses.replace(CustomPrompt(), field_output="ref")


def test_data_set_entries_reach_the_data_floor():
    entry = {"path": "x", "type": "chat_template", "split": "dev", "name": "n", "revision": "r"}
    entry |= {"data_files": ["a", "b"], "field_messages": "turns", "train_on_eos": "last"}
    entry |= {"message_field_role": "from", "roles": {"user": ["me"]}, "roles_to_train": ["bot"]}
    entry |= {"drop_system_message": True}
    entry |= {"chat_template": "jinja", "chat_template_jinja": "{{ x }}", "field": "f"}
    assert held_out_specs(load_config(MINIMAL | {"test_datasets": [entry]})) == (
        DatasetSpec(
            path="x",
            type="chat_template",
            split="dev",
            data_files=("a", "b"),
            name="n",
            revision="r",
            field="f",
            field_messages="turns",
            message_property_mappings={"role": "from"},
            roles={"user": ("me",)},
            roles_to_train=("bot",),
            train_on_eos="last",
            chat_template="{{ x }}",
            drop_system_message=True,
        ),
    )


def test_texts_to_pretrain_on_are_completions():
    entry = {"path": "x", "name": "n", "split": "dev", "text_column": "body", "data_files": "a"}
    given = {"datasets": None, "pretraining_dataset": [entry | {"type": "pretrain"}]}
    assert train_specs(load_config(MINIMAL | given)) == (
        DatasetSpec(
            path="x", type="completion", split="dev", data_files="a", name="n", field="body"
        ),
    )
    assert len(train_specs(load_config(MINIMAL | {"pretraining_dataset": [entry]}))) == 2


@pytest.mark.parametrize(
    ("given", "mapped"),
    [
        ({}, {}),
        ({"field_thinking": "why"}, {"reasoning_content": "why"}),
        ({"template_thinking_key": "thinking"}, {"thinking": "reasoning_content"}),
        ({"field_thinking": "why", "template_thinking_key": "thinking"}, {"thinking": "why"}),
    ],
)
def test_the_reasoning_of_a_message_is_a_property_like_others(given, mapped):
    entry = {"path": "x", "type": "chat_template", **given}
    (spec,) = train_specs(load_config(MINIMAL | {"datasets": [entry]}))
    assert spec.message_property_mappings == {"role": "role", "content": "content", **mapped}


def test_data_options_reach_the_data_floor():
    extra = {"sequence_len": 64, "train_on_inputs": True, "sample_packing": True, "seed": 3}
    extra |= {"val_set_size": 0.1, "excess_length_strategy": "raise", "eot_tokens": ["<e>"]}
    extra |= {"dataset_prepared_path": "p", "chat_template": "chatml"}
    extra |= {"min_sample_len": 4}
    options = data_options(load_config(MINIMAL | extra | {"shuffle_merged_datasets": False}))
    for key, value in (extra | {"eot_tokens": ("<e>",)}).items():
        assert getattr(options, key) == value, key
    assert options.pad_to_sequence_len
    assert options.eval_sample_packing
    assert not options.shuffle
    assert not options.deduplicate
    assert data_options(load_config(MINIMAL | {"dataset_exact_deduplication": True})).deduplicate


def test_a_stream_is_read_as_far_as_the_steps_need():
    given = MINIMAL | {
        "streaming": True,
        "max_steps": 10,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "sequence_len": 64,
    }
    options = data_options(load_config(given), replicas=4)
    assert (options.stream_examples, options.stream_tokens) == (10 * 2 * 3 * 4, None)
    options = data_options(load_config(given | {"sample_packing": True}), replicas=4)
    assert (options.stream_examples, options.stream_tokens) == (None, 10 * 2 * 3 * 4 * 64)
    assert options.stream_weights is None
    mixed = given | {"dataset_mixing_strategy": "interleave"}
    assert data_options(load_config(mixed)).stream_weights == (1.0,)
    assert train_specs(load_config(given))[0].streaming
    assert not train_specs(load_config(MINIMAL))[0].streaming
