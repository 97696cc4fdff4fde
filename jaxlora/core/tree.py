"""Parameter trees are nested dicts; a path is the keys joined by ``/``."""

from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns ``{path: leaf}``; anything that is not a mapping is a leaf.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def replace(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> Tree:
    """Returns a copy of `tree` with the leaves at the given paths replaced or added."""
    return unflatten({**flatten(tree), **leaves})
