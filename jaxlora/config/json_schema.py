"""The configuration as a JSON schema, from which editors complete and check a YAML file."""

from typing import Any

from jaxlora.config.datasets import LEGACY_KEYS, TYPE_ALIASES
from jaxlora.config.keys import DATASET_REFUSED, IMPLIED, MAPPED, NO_OP, REFUSED
from jaxlora.config.notes import read_as
from jaxlora.config.roles import HARMLESS, INERT
from jaxlora.config.schema import Config

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
_NOTHING = (None, False, 0, "", [], {})


def json_schema() -> dict[str, Any]:
    """Returns the schema of a configuration file, draft 2020-12.

    It knows names, types, ranges and reasons; the rules between keys are `jaxlora config check`'s.

    >>> json_schema()["properties"]["lora_r"]["description"]
    'Rank of the adapter; required with `adapter`.'
    """
    schema = _plain(Config.model_json_schema())
    keys, datasets = schema["properties"], schema["$defs"]["DatasetConfig"]["properties"]
    del keys["foreign"]
    for name, field in keys.items():
        # Left out where the section says the same.
        field.setdefault("description", Config.model_fields[name].description)
    datasets["type"]["anyOf"].append({"enum": list(TYPE_ALIASES)})
    keys |= {name: {"description": f"no effect: {why}"} for name, why in NO_OP.items()}
    keys |= {name: {"description": read_as(name)} for name in (*MAPPED, *IMPLIED)}
    keys |= {name: _refused(name, why) for name, why in REFUSED.items()}
    datasets |= {name: _refused(name, why) for name, why in DATASET_REFUSED.items()}
    datasets |= {name: {"type": "string", "description": why} for name, why in LEGACY_KEYS.items()}
    for section in (schema, *schema["$defs"].values()):
        section["properties"] = {
            name: _nullable(field) for name, field in section["properties"].items()
        }
    return {"$schema": _DIALECT, **schema, "title": "jaxlora configuration"}


def _plain(node: Any) -> Any:
    """Without titles, which repeat the names, and with the bounds that pydantic left in its own."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        _BOUNDS.get(key, key): _plain(each)
        for key, each in node.items()
        if not (key == "title" and isinstance(each, str))
    }


def _refused(name: str, why: str) -> dict[str, Any]:
    described: dict[str, Any] = {"description": f"refused: {why}"}
    if name not in HARMLESS:
        described["enum"] = [*_NOTHING, *([INERT[name]] if name in INERT else [])]
    return described


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    """A key that is null has its default."""
    kinds = field.get("anyOf", [])
    nullable = {"type": "null"} in kinds or None in field.get("enum", ())
    if nullable or not field.keys() & {"type", "$ref", "anyOf", "enum", "const"}:
        return field
    about = {key: field[key] for key in ("description", "default") if key in field}
    value = {key: each for key, each in field.items() if key not in (*about, "anyOf")}
    return {**about, "anyOf": [*(kinds or [value]), {"type": "null"}]}
