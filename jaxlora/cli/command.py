"""One command of the command line."""

import argparse
from collections.abc import Callable
from typing import Any

_OVERRIDES = """Any key of docs/configuration.md can follow as --key=value:
  jaxlora {name} my.yml --lora_r=32 --datasets.0.path=x.jsonl
"""

Run = Callable[[argparse.Namespace], int | None]


def add_command(
    commands: Any, name: str, run: Run, text: str, *, examples: str = "", config: str = ""
) -> argparse.ArgumentParser:
    """Adds a command and returns its parser.

    Args:
      commands: from `add_subparsers`.
      name, text: its name and what it does.
      run: does it; returns the exit status, None for 0.
      examples: the end of its help.
      config: all words of a command that takes a configuration and overrides of its keys.
    """
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=_OVERRIDES.format(name=config) if config else examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run, takes_overrides=bool(config))
    if config:
        command.add_argument("config", help="YAML file, or Python file with get_config()")
    return command
