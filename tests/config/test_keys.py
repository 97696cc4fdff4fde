import re

import pytest
from minimal_configs import MINIMAL

from jaxlora.config import keys
from jaxlora.config.load import load_config
from jaxlora.config.notes import notes
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError


@pytest.mark.parametrize("key", sorted(keys.NO_OP))
def test_no_op_key_is_accepted_and_noted(key):
    value = ["axolotl.integrations.liger.LigerPlugin"] if key == "plugins" else True
    assert any(
        line.startswith(f"{key}: no effect: ")
        for line in notes(load_config(MINIMAL | {key: value}))
    )


@pytest.mark.parametrize("key", sorted(keys.REFUSED))
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_refused_key_is_accepted_when_it_asks_for_nothing(key, value):
    assert notes(load_config(MINIMAL | {key: value})) == []


@pytest.mark.parametrize("key", sorted(keys.REFUSED))
def test_refused_key_is_an_error_when_live(key):
    with pytest.raises(UserError, match=f"^configuration: {key}: {re.escape(keys.REFUSED[key])}$"):
        load_config(MINIMAL | {key: 2})


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
        ("tensor_parallel_size", 2, {"mesh": {"tensor": 2}}),
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


def test_plugins_other_than_speed_are_refused():
    with pytest.raises(UserError, match=r"plugins: my\.Plugin is not available"):
        load_config(MINIMAL | {"plugins": ["axolotl.integrations.liger.LigerPlugin", "my.Plugin"]})


def test_each_key_has_one_role():
    roles = [Config.model_fields, keys.NO_OP, keys.REFUSED, keys.MAPPED]
    names = [name for role in roles for name in role]
    assert len(names) == len(set(names))
    assert set(keys.SYNONYMS).isdisjoint(names)
    assert set(keys.SYNONYMS.values()) <= set(Config.model_fields)
