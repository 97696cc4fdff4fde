"""Loads a configuration from a YAML file, a Python file or a mapping, and writes one."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from jaxlora.config.check import check, examine, line_of
from jaxlora.config.document import Document, Dumper, plain, read
from jaxlora.config.overrides import apply_overrides, flag, parse_overrides
from jaxlora.config.problem import Path, Problem
from jaxlora.config.schema import Config

# Keys that may name a local file or folder, at the top and in a data set.
PATHS = (
    "base_model",
    "base_model_config",
    "tokenizer_config",
    "lora_model_dir",
    "resume_from_checkpoint",
    "chat_template",
    "chat_template_jinja",
)
DATASET_PATHS = ("path", "data_files", "chat_template", "chat_template_jinja")


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Returns the checked configuration of a file or a mapping.

    A relative path is looked up from the working directory first and from the folder of the file
    second; a path found only there becomes absolute, anything else (a hub id) stays as written.

    >>> load_config(
    ...     {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}]},
    ...     ["--learning_rate=2e-4"],
    ... ).learning_rate
    0.0002

    Args:
      source: a YAML file, a Python file with ``get_config()``, or a mapping.
      overrides: command-line arguments such as ``--lora_r=32``.

    Raises:
      UserError: with one line for each problem, each naming the key and its place.
    """
    values, where = _written(source, overrides)
    return check(values, where=where)


@dataclasses.dataclass(frozen=True)
class Examined:
    """A file that may be wrong: the keys as written, what is right of them, and the problems."""

    values: dict[str, Any]
    config: Config
    problems: list[Problem]
    errors: list[str]
    """The problems as lines that begin with their place."""


def examine_config(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Examined:
    """Reads a configuration as `load_config` does, and goes on where it would raise.

    Raises:
      UserError: a file that cannot be read at all.
    """
    values, where = _written(source, overrides)
    config, problems = examine(values)
    return Examined(values, config, problems, [line_of(problem, where) for problem in problems])


def _written(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], Callable[[Path], str]]:
    """Returns keys and values with the overrides in place, and the place of each key."""
    if isinstance(source, str | os.PathLike):
        document = read(os.fspath(source))
    else:
        document = Document(plain(source))
    overridden = parse_overrides(overrides)
    values = apply_overrides(_with_paths(document.values, document.folder), overridden)

    def where(path: Path) -> str:
        for end in range(len(path), 0, -1):
            if path[:end] in overridden:
                return flag(path[:end])
        return document.where(path)

    return values, where


def dump_config(config: Config) -> str:
    """Returns YAML that `load_config` reads back as an equal configuration."""
    values = config.model_dump(mode="json", exclude_unset=True)
    foreign = values.pop("foreign", {})
    return yaml.dump({**values, **foreign}, Dumper=Dumper, sort_keys=False)


def _with_paths(values: dict[str, Any], folder: str | None) -> dict[str, Any]:
    if folder is None:
        return values
    found = {key: _located(values[key], folder) for key in PATHS if key in values}
    for key in ("datasets", "pretraining_dataset", "test_datasets"):
        if isinstance(values.get(key), list):
            found[key] = [_with_dataset_paths(entry, folder) for entry in values[key]]
    return {**values, **found}


def _with_dataset_paths(entry: Any, folder: str) -> Any:
    if not isinstance(entry, dict):
        return entry
    return entry | {key: _located(entry[key], folder) for key in DATASET_PATHS if key in entry}


def _located(value: Any, folder: str) -> Any:
    if isinstance(value, list):
        return [_located(item, folder) for item in value]
    if not isinstance(value, str) or not value or os.path.exists(value):
        return value
    beside = os.path.normpath(os.path.join(folder, value))
    return beside if os.path.exists(beside) else value
