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
    """The inverse of `flatten`, but that every key is a string now.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: Tree = {}
    for path, leaf in flat.items():
        _put(tree, path, leaf)
    return tree


def replace(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> Tree:
    """Returns a copy of `tree` with the leaves at the given paths replaced or added.

    Keys stay what they are: NNX numbers the layers of a list, and told "10" it would read layer 2.
    """
    added = dict(leaves)

    def copy(node: Mapping[str, Any], prefix: str) -> Tree:
        return {
            key: copy(value, f"{prefix}{key}/")
            if isinstance(value, Mapping)
            else added.pop(f"{prefix}{key}", value)
            for key, value in node.items()
        }

    copied = copy(tree, "")
    for path, leaf in added.items():
        _put(copied, path, leaf)
    return copied


def _put(tree: Tree, path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf
