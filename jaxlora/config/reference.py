"""Writes docs/configuration.md from the schema."""

import json
from collections.abc import Iterator, Mapping

from pydantic.fields import FieldInfo

from jaxlora.config.datasets import (
    BnbConfig,
    DatasetConfig,
    LoftqConfig,
    MeshConfig,
    PeftConfig,
    PretrainingDataset,
    PromptFormat,
    SpecialTokens,
)
from jaxlora.config.keys import DATASET_REFUSED, IMPLIED, MAPPED, NO_OP, REFUSED
from jaxlora.config.notes import read_as
from jaxlora.config.schema import SECTIONS
from jaxlora.config.values import Section
from jaxlora.config.wording import expected, section_of

_INTRODUCTION = """# Configuration

One YAML file, or a Python file whose `get_config()` returns an `ml_collections.ConfigDict`,
describes a run. The keys are Axolotl's; those marked (jaxlora) are ours. A key that is absent or
null has its default. An unknown key is an error. Any key can be overridden on the command line:
`--lora_r=32`, `--datasets.0.path=data.jsonl`.

`jaxlora config check my.yml` says what becomes of every key of a file and what follows from them
(steps, warm-up, checkpoints, rows and tokens of a step), with every error at once; it needs neither
the model nor the data. `jaxlora train my.yml --dry-run` opens both, has the numbers, and writes
nothing. `jaxlora init` writes a first file, `jaxlora fetch configs` copies the examples.

For completion and checks in an editor, `jaxlora config schema > jaxlora.schema.json` and begin the
file with `# yaml-language-server: $schema=jaxlora.schema.json`.

A relative path is looked up from the working directory first, then from the folder of the file.

This page is written from the schema; `python -c "from jaxlora.config.reference import markdown;
print(markdown(), end='')"` prints it.
"""

_NESTED = {
    "An entry of datasets and test_datasets": DatasetConfig,
    "An entry of pretraining_dataset": PretrainingDataset,
    "type of an entry, spelled out": PromptFormat,
    "mesh": MeshConfig,
    "special_tokens": SpecialTokens,
    "bnb_config_kwargs": BnbConfig,
    "peft": PeftConfig,
    "peft.loftq_config": LoftqConfig,
}


def markdown() -> str:
    """Returns the reference page of all keys."""
    parts = [_INTRODUCTION]
    parts += [f"## {section.__doc__}\n\n{_table(section)}" for section in SECTIONS]
    parts += [f"## {title}\n\n{_table(section)}" for title, section in _NESTED.items()]
    mapped = {key: read_as(key) or "" for key in (*MAPPED, *IMPLIED)}
    parts.append(f"## Other names\n\n{_reasons(mapped)}")
    title = "## Axolotl's keys that change nothing here\n\nAccepted, with a note.\n"
    parts.append(f"{title}\n{_reasons(NO_OP)}")
    title = "## Axolotl's keys that are refused\n\nOnly when set to a live value.\n"
    nested = {f"datasets[].{key}": reason for key, reason in DATASET_REFUSED.items()}
    parts.append(f"{title}\n{_reasons({**REFUSED, **nested})}")
    return "\n".join(parts)


def _table(section: type[Section]) -> str:
    return "".join(["| key | value | default | meaning |\n|---|---|---|---|\n", *_rows(section)])


def _rows(section: type[Section]) -> Iterator[str]:
    # Only the fields of this class: a section does not repeat those of another.
    for name, field in section.model_fields.items():
        if name != "foreign":
            values = _values(field)
            yield f"| `{name}` | {values} | {_default(field)} | {field.description} |\n"


def _values(field: FieldInfo) -> str:
    if section_of(field.annotation) is field.annotation:
        return "a mapping, see below"
    return expected(field.annotation, field.metadata).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "see below"
    return f"`{json.dumps(value)}`"


def _reasons(reasons: Mapping[str, str]) -> str:
    keys: dict[str, list[str]] = {}
    for key, reason in sorted(reasons.items()):
        keys.setdefault(reason, []).append(f"`{key}`")
    rows = "".join(f"| {', '.join(names)} | {reason} |\n" for reason, names in keys.items())
    return f"| keys | what becomes of them |\n|---|---|\n{rows}"
