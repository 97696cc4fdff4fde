"""Commands that write, explain and check configurations: init, config, fetch."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxlora.cli.command import add_command
from jaxlora.core.errors import UserError

if TYPE_CHECKING:
    from jaxlora.config.schema import Config

_INIT = """examples:
  jaxlora init my.yml
  jaxlora init my.yml --model Qwen/Qwen3-0.6B --data rows.jsonl --hardware gpu-24gb
"""
_SCHEMA = """examples:
  jaxlora config schema > jaxlora.schema.json
An editor with YAML support completes keys and shows mistakes in a file that begins with
  # yaml-language-server: $schema=jaxlora.schema.json
"""
_FETCH = """examples:
  jaxlora fetch configs
  jaxlora fetch configs --to recipes
"""


def add_commands(commands: Any) -> None:
    """Adds the commands of this module."""
    init = add_command(commands, "init", _init, "Write a configuration.", examples=_INIT)
    init.add_argument("file", nargs="?", default="config.yml", help="new file (config.yml)")
    init.add_argument("--model", help="folder or hub id of the base model")
    init.add_argument("--data", help="file, folder or hub id of the training data")
    init.add_argument("--hardware", help="cpu, gpu-16gb, gpu-24gb, gpu-80gb or tpu")
    config = commands.add_parser("config", help="Check a configuration, or print its schema.")
    parts = config.add_subparsers(dest="part", required=True, metavar="PART")
    text = "Say what becomes of every key; needs neither the model nor the data."
    add_command(parts, "check", _check, text, config="config check")
    add_command(parts, "schema", _schema, "Print a JSON schema.", examples=_SCHEMA)
    fetch = commands.add_parser("fetch", help="Copy what comes with jaxlora.")
    parts = fetch.add_subparsers(dest="part", required=True, metavar="PART")
    configs = add_command(
        parts, "configs", _fetch, "Copy the example configurations.", examples=_FETCH
    )
    configs.add_argument("--to", default="configs", help="folder (configs)")


def print_report(
    source: str, overrides: Sequence[str], derive: Callable[["Config"], str] | None = None
) -> int:
    """Prints what becomes of the keys of a file, its values, and what follows; returns 0 or 2.

    Args:
      source: the file.
      overrides: of its keys.
      derive: says what follows from a configuration; None: what can be said without its data.
    """
    from jaxlora.config import report
    from jaxlora.config.load import examine_config

    examined = examine_config(source, overrides)
    print(report.describe_keys(examined))
    if examined.errors:
        sys.stdout.flush()
        for line in examined.errors:
            print(f"jaxlora: error: {line}", file=sys.stderr)
        return 2
    print(f"\nresolved configuration:\n{report.describe_values(examined.config)}")
    print(f"\nderived:\n{(derive or report.describe_derived)(examined.config)}")
    return 0


def _check(options: argparse.Namespace) -> int:
    return print_report(options.config, options.overrides)


def _schema(options: argparse.Namespace) -> None:
    from jaxlora.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=1))


def _init(options: argparse.Namespace) -> None:
    from jaxlora.config import starter

    answers = {name: getattr(options, name) for name in starter.QUESTIONS}
    for name, question in starter.QUESTIONS.items():
        if answers[name] is None and not sys.stdin.isatty():
            raise UserError(f"init: --{name} is missing: {question}")
        answers[name] = answers[name] or input(f"{question}: ").strip()
    starter.write(options.file, **answers)
    print(f"written: {options.file}\ncheck it: jaxlora config check {options.file}")


def _fetch(options: argparse.Namespace) -> None:
    from jaxlora.config.shipped import copy_configs

    for path in copy_configs(options.to):
        print(path)
