"""YAML in which scripts can be read: texts of several lines stand as they are."""

from typing import Any

import yaml

from jaxlora.config.document import Dumper


class _Readable(Dumper):
    pass


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _text)


def dump(*documents: dict[str, Any]) -> str:
    r"""Returns the YAML of one document or several.

    >>> print(dump({"run": "cd x\n./y\n"}), end="")
    run: |
      cd x
      ./y
    """
    return yaml.dump_all(documents, Dumper=_Readable, sort_keys=False, width=10_000)
