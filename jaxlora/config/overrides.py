"""Overrides on the command line: ``--lora_r=32``, ``--lora-r 32``, ``--datasets.0.path=x``."""

from collections.abc import Sequence
from typing import Any

from jaxlora.config.document import parse_yaml, plain
from jaxlora.core.errors import UserError

Path = tuple[str | int, ...]


def parse_overrides(arguments: Sequence[str]) -> dict[Path, Any]:
    """Returns the value of each overridden key.

    >>> parse_overrides(["--learning-rate=2e-5", "--datasets.0.path", "a.jsonl"])
    {('learning_rate',): 2e-05, ('datasets', 0, 'path'): 'a.jsonl'}

    Raises:
      UserError: on a stray argument, a flag without a value, or a flag given twice.
    """
    values: dict[Path, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"{flag}: stray argument; overrides are written --key=value")
        name, has_value, text = flag.partition("=")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{flag}: needs a value, for instance {flag}=true")
            text = rest.pop(0)
        path = _path(name)
        for other in values:
            shorter = min(len(path), len(other))
            if path[:shorter] == other[:shorter]:
                raise UserError(f"{name}: given twice; keep one")
        values[path] = parse_yaml(text, name)[0]
    return values


def apply_overrides(values: dict[str, Any], overrides: dict[Path, Any]) -> dict[str, Any]:
    """Returns a copy of `values` with the overrides in place.

    Raises:
      UserError: if a path runs through something that is not there.
    """
    changed = plain(values)
    for path, value in overrides.items():
        node: Any = changed
        for depth, part in enumerate(path[:-1]):
            _require_room(node, part, path)
            child = node.get(part) if isinstance(node, dict) else node[part]
            if child is None and isinstance(path[depth + 1], str):
                child = {}
            node[part] = child
            node = child
        _require_room(node, path[-1], path)
        node[path[-1]] = value
    return changed


def flag(path: Path) -> str:
    """Returns the path as a flag.

    >>> flag(("datasets", 0, "path"))
    '--datasets.0.path'
    """
    return "--" + ".".join(map(str, path))


def _path(name: str) -> Path:
    parts = name[2:].replace("-", "_").split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _require_room(node: Any, part: str | int, path: Path) -> None:
    if isinstance(node, dict) and isinstance(part, str):
        return
    if isinstance(node, list) and isinstance(part, int):
        if part < len(node):
            return
        raise UserError(f"{flag(path)}: there are only {len(node)} entries, counted from 0")
    raise UserError(f"{flag(path)}: {part} does not name a part of the configuration")
