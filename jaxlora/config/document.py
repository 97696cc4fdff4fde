"""Reads a configuration file, YAML or Python, and remembers where each key stands."""

import dataclasses
import os
import re
import runpy
import traceback
from collections.abc import Mapping
from typing import Any

import yaml

from jaxlora.core.errors import UserError

# YAML 1.2: 2e-5 is a number. YAML 1.1, which PyYAML follows, wants 2.0e-5.
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|0x[0-9a-fA-F_]+$|0o[0-7]+$")
_REPLACED = ("float", "int", "timestamp")


class Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of YAML 1.2, and with dates and 1:30 left as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own protocol)
        first: [(tag, regexp) for tag, regexp in rules if tag.rpartition(":")[2] not in _REPLACED]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


@dataclasses.dataclass(frozen=True)
class Document:
    """A configuration as written: values, the file's name and folder, the line of each key."""

    values: dict[str, Any]
    name: str = "configuration"
    folder: str | None = None
    lines: Mapping[tuple[str | int, ...], int] = dataclasses.field(default_factory=dict)

    def where(self, path: tuple[str | int, ...]) -> str:
        """Returns ``file:line`` of the key, or of the nearest mapping around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return self.name


def read(path: str) -> Document:
    """Reads a YAML file, or a Python file with ``get_config()``.

    Raises:
      UserError: with the file and line of what cannot be read.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a YAML or Python configuration file")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such configuration file")
    folder = os.path.dirname(os.path.abspath(path))
    if path.endswith(".py"):
        return Document(_read_python(path), path, folder)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    values, lines = parse_yaml(text, path)
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type(values).__name__}"
        raise UserError(f"{path}:1: {found}; expected lines such as base_model: folder")
    return Document(values, path, folder, lines)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """Returns the value of one YAML document and the line of each key.

    >>> parse_yaml("learning_rate: 2e-5", "run.yml")
    ({'learning_rate': 2e-05}, {('learning_rate',): 1})

    Raises:
      UserError: if it is not YAML, or a key stands twice in a mapping.
    """
    lines: dict[tuple[str | int, ...], int] = {}
    _require_printable(text, name)
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _visit(node, (), lines, name, set())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    finally:
        loader.dispose()


def _require_printable(text: str, name: str) -> None:
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise UserError(f"{name}:{line}: not valid YAML: control character {bad.group()!r}")


def _visit(node: yaml.Node, path: tuple[str | int, ...], lines: dict, name: str, seen: set) -> None:
    """Records the line of each key below `node` and refuses repeated ones."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[*path, i] = item.start_mark.line + 1
            _visit(item, (*path, i), lines, name, seen)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            inner = (*path, str(key.value))
            if inner in lines and key.value != "<<":
                raise UserError(f"{name}:{line}: {key.value} is already set in line {lines[inner]}")
            lines[inner] = line
            _visit(value, inner, lines, name, seen)


def _read_python(path: str) -> dict[str, Any]:
    try:
        # run_path leaves sys.path alone and writes no bytecode.
        names = runpy.run_path(path, run_name="jaxlora_config")
        get_config = names.get("get_config")
        if not callable(get_config):
            raise UserError(f"{path}: has no function get_config() that returns the configuration")
        config = get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = f":{frames[-1].lineno}" if frames else ""
        raise UserError(f"{path}{line}: {type(error).__name__}: {error}") from None
    values = plain(config)
    if not isinstance(values, dict):
        raise UserError(f"{path}: get_config() returned {type(values).__name__}, not a ConfigDict")
    return values


def plain(value: Any) -> Any:
    """Returns a copy made of dicts and lists only; reads an `ml_collections.ConfigDict`."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
