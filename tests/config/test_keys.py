import re
from pathlib import Path

import pytest
from minimal_configs import MINIMAL

from jaxlora.config import keys
from jaxlora.config.datasets import DatasetConfig
from jaxlora.config.load import load_config
from jaxlora.config.notes import notes
from jaxlora.config.roles import is_live, no_effect, refusal
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError

LISTS = (Path(__file__).parent / "axolotl_keys.txt").read_text().split("\n\n")[1:]
AXOLOTL, AXOLOTL_DATASET = (text.split() for text in LISTS)
SPEED = "axolotl.integrations.liger.LigerPlugin"


def test_every_key_of_axolotl_has_exactly_one_role():
    roles = [Config.model_fields, keys.NO_OP, keys.REFUSED, keys.MAPPED, keys.IMPLIED]
    assert len(AXOLOTL) > 490
    assert {name: sum(name in role for role in roles) for name in AXOLOTL} == dict.fromkeys(
        AXOLOTL, 1
    )


def test_every_key_of_axolotls_data_sets_has_exactly_one_role():
    legacy = ("message_field_role", "message_field_content")
    roles = [DatasetConfig.model_fields, keys.DATASET_REFUSED, legacy]
    assert len(AXOLOTL_DATASET) > 40
    for name in AXOLOTL_DATASET:
        assert sum(name in role for role in roles) == 1, name


@pytest.mark.parametrize("key", sorted(keys.NO_OP))
def test_no_op_key_is_accepted_and_noted(key):
    (line,) = notes(load_config(MINIMAL | {key: True}))
    assert line == f"{key}: no effect: {keys.NO_OP[key]}"


@pytest.mark.parametrize("key", sorted(keys.REFUSED))
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_refused_key_is_accepted_when_it_asks_for_nothing(key, value):
    assert notes(load_config(MINIMAL | {key: value})) == []


@pytest.mark.parametrize("key", sorted(keys.REFUSED))
def test_refused_key_is_an_error_when_live(key):
    reason = re.escape(keys.REFUSED[key])
    with pytest.raises(UserError, match=f"^configuration: {key}: (2: )?{reason}$"):
        load_config(MINIMAL | {key: 2})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plugins", [SPEED, "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]),
        ("plugins", ["axolotl.integrations.swanlab.SwanLabPlugin"]),
        ("model_config", {"output_router_logits": True}),
        ("optim_args", {"bf16_stochastic_round": True}),
        ("optim_args", "bf16_stochastic_round=True"),
        ("model_quantization_config", "Mxfp4Config"),
        ("model_quantization_config_kwargs", {"dequantize": True}),
    ],
)
def test_harmless_value_of_a_refused_key_is_noted(key, value):
    (line,) = notes(load_config(MINIMAL | {key: value}))
    assert re.fullmatch(f"{key}: no effect: .+", line)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("plugins", [SPEED, "my.Plugin"], "my.Plugin"),
        ("plugins", ["axolotl.integrations.ligerish.Plugin"], "axolotl.integrations.ligerish"),
        ("model_config", {"output_router_logits": True, "rope_theta": 1e6}, "rope_theta"),
        ("optim_args", "eps=1e-3,bf16_stochastic_round=True", "eps"),
        ("model_quantization_config", "FineGrainedFP8Config", "FineGrainedFP8Config"),
    ],
)
def test_other_parts_of_a_refused_key_are_named(key, value, part):
    with pytest.raises(UserError, match=f"^configuration: {key}: {part}.*: not available"):
        load_config(MINIMAL | {key: value})


@pytest.mark.parametrize("key", ["peft_autocast_adapter_dtype", "save_safetensors"])
def test_false_asks_for_something_where_the_default_is_true(key):
    assert is_live(key, False)
    assert len(notes(load_config(MINIMAL | {key: False}))) == 1


def test_a_key_that_asks_for_nothing_is_neither_refused_nor_noted():
    for key, value in {"qat": None, "fsdp": [], "rl": ""}.items():
        assert refusal(key, value) is None
        assert no_effect(key, value) == "it asks for nothing"
        assert notes(load_config(MINIMAL | {key: value})) == []
    assert notes(load_config(MINIMAL | {"context_parallel_size": 1})) == []


@pytest.mark.parametrize("task", [{"rl": "dpo"}, {"reward_model": True}])
def test_another_task_is_the_one_reason_whatever_its_data(task):
    rows = {"path": "x", "type": "chat_template.argilla_chat", "field_chosen": "chosen"}
    with pytest.raises(UserError) as error:
        load_config(MINIMAL | task | {"rl_beta": 0.1, "datasets": [rows]})
    assert str(error.value) == (
        f"configuration: {next(iter(task))}: preference and reward training are not available"
    )


@pytest.mark.parametrize(
    ("given", "bf16"),
    [
        ({"fp16": True, "bf16": False}, True),
        ({"float16": True}, True),
        ({"float32": True, "bf16": "auto"}, False),
        ({"fp16": False, "bf16": "auto"}, "auto"),
    ],
)
def test_other_precisions_are_read_as_the_nearest(given, bf16):
    config = load_config(MINIMAL | given)
    assert config.bf16 == bf16
    flag, value = next(iter(given.items()))
    assert (notes(config) != []) == value
    assert all(line.startswith(f"{flag}: read as bf16: ") for line in notes(config))


@pytest.mark.parametrize("given", [{"float32": True, "bf16": True}, {"fp16": "yes please"}])
def test_precision_that_contradicts_is_refused(given):
    with pytest.raises(UserError, match=f"^configuration: {next(iter(given))}: "):
        load_config(MINIMAL | given)


@pytest.mark.parametrize("key", sorted(keys.DATASET_REFUSED))
def test_refused_key_of_a_data_set_is_an_error_only_when_live(key):
    entry = MINIMAL["datasets"][0]
    load_config(MINIMAL | {"datasets": [entry | {key: False}]})
    with pytest.raises(UserError, match=rf"datasets\[0\]\.{key}: "):
        load_config(MINIMAL | {"datasets": [entry | {key: "x"}]})


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("dp_shard_size", 4, {"mesh": {"fsdp": 4}}),
        ("dp_replicate_size", 2, {"mesh": {"data": 2}}),
        ("tensor_parallel_size", 2, {"mesh": {"tensor": 2}}),
        ("context_parallel_size", 2, {"mesh": {"context": 2}}),
        ("sequence_parallel_degree", 2, {"mesh": {"context": 2}}),
        ("expert_parallel_size", 2, {"mesh": {"expert": 2}}),
        ("bfloat16", True, {"bf16": True}),
        ("model_revision", "main", {"revision_of_model": "main"}),
    ],
)
def test_mapped_key_means_ours_and_may_not_contradict_it(key, value, ours):
    mapped, plain = load_config(MINIMAL | {key: value}), load_config(MINIMAL | ours)
    assert mapped.model_dump(exclude={"foreign"}) == plain.model_dump(exclude={"foreign"})
    assert any(line.startswith(f"{key}: read as ") for line in notes(mapped))
    load_config(MINIMAL | ours | {key: value})
    other = 8 if isinstance(value, int) and value is not True else False
    with pytest.raises(UserError, match=f"{key}: it means the same as"):
        load_config(MINIMAL | ours | {key: other})


def test_each_key_has_one_role():
    roles = [Config.model_fields, keys.NO_OP, keys.REFUSED, keys.MAPPED, keys.IMPLIED]
    names = [name for role in roles for name in role]
    assert len(names) == len(set(names))
    assert set(keys.SYNONYMS).isdisjoint(names)
    assert set(keys.SYNONYMS.values()) <= set(Config.model_fields)
