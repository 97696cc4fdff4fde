import json
from pathlib import Path

import pytest
from minimal_configs import LORA, MINIMAL

from jaxlora.config.document import parse_yaml
from jaxlora.config.json_schema import json_schema
from jaxlora.config.keys import DATASET_REFUSED, IMPLIED, MAPPED, NO_OP, REFUSED
from jaxlora.config.load import load_config
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yml"))


def test_schema_is_valid_and_is_json():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_every_key_is_in_the_schema_with_a_description():
    names = set(Config.model_fields) - {"foreign"}
    assert set(SCHEMA["properties"]) == names.union(NO_OP, REFUSED, MAPPED, IMPLIED)
    assert set(SCHEMA["$defs"]["DatasetConfig"]["properties"]) >= set(DATASET_REFUSED)
    sections = (SCHEMA, *SCHEMA["$defs"].values())
    for section in sections:
        for name, field in section["properties"].items():
            assert field.get("description"), name


def numbers(node, path=""):
    """Yields the path and the schema of everything that may be a number."""
    if isinstance(node, list):
        for i, each in enumerate(node):
            yield from numbers(each, f"{path}.{i}")
    if isinstance(node, dict):
        if node.get("type") in ("integer", "number"):
            yield path, node
        for key, each in node.items():
            yield from numbers(each, f"{path}.{key}")


def test_every_numeric_key_has_bounds():
    found = dict(numbers(SCHEMA))
    assert len(found) > 40
    for path, node in found.items():
        fixed = "const" in node or "enum" in node
        assert fixed or node.keys() & {"minimum", "exclusiveMinimum"}, path
        assert fixed or node.keys() & {"maximum", "exclusiveMaximum"}, path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configuration_is_valid(path):
    VALIDATOR.validate(parse_yaml(path.read_text(), path.name)[0])


ACCEPTED = [
    {"lora_r": None, "special_tokens": None, "datasets": None, "mesh": {"data": None}},
    {"bf16": "auto", "tf32": True, "peft_layers_to_transform": [1, 2]},
    {"flash_attention": True, "fsdp_config": {"x": 1}, "rl": None, "qat": {}},
    {"context_parallel_size": 1, "plugins": ["axolotl.integrations.liger.LigerPlugin"]},
    {"datasets": [{"path": "x", "type": "chat_template.default", "message_field_role": "from"}]},
    {"datasets": [{"path": "x", "type": {"field_output": "a"}, "shards": None}]},
]
REJECTED = [
    {"lora_rr": 8},
    {"foreign": {}},
    {"lora_dropout": 1.0},
    {"micro_batch_size": 0},
    {"sample_packing": "yes"},
    {"lr_scheduler": "cosin"},
    {"rl": "dpo"},
    {"group_by_length": True},
    {"datasets": [{"path": "x", "type": "alpaca", "shards": 0}]},
    {"datasets": [{"path": "x", "type": "alpaca", "splt": "x"}]},
    {"datasets": [{"type": "alpaca"}]},
    {"mesh": {"tensr": 2}},
]


@pytest.mark.parametrize("values", ACCEPTED)
def test_what_is_read_is_valid(values):
    VALIDATOR.validate(LORA | values)
    if values.get("datasets", True):
        load_config(LORA | {"lora_r": 8} | {k: v for k, v in values.items() if k != "lora_r"})


@pytest.mark.parametrize("values", REJECTED)
def test_what_is_refused_is_not_valid(values):
    assert not VALIDATOR.is_valid(MINIMAL | values)
    with pytest.raises(UserError):
        load_config(MINIMAL | values)
