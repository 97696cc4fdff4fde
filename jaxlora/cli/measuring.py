"""The command `bench`."""

import argparse
import json
from pathlib import Path
from typing import Any

from jaxlora.cli.command import add_command

_TEXT = "Time some train steps here: tokens/s, MFU, memory, and where the time goes."


def add_commands(commands: Any) -> None:
    """Adds the commands of this module."""
    bench = add_command(commands, "bench", _bench, _TEXT, config="bench")
    bench.add_argument(
        "--steps", type=int, metavar="N", help="to time (default: 5 to 50, about 15 seconds)"
    )
    bench.add_argument("--output", type=Path, metavar="FILE", help="PNG (default: NAME-bench.png)")
    bench.add_argument("--json", action="store_true", help="print all of it as JSON")


def _bench(options: argparse.Namespace) -> None:
    from jaxlora.config.load import load_config
    from jaxlora.measuring.bench import bench
    from jaxlora.measuring.report import describe, plot

    config = load_config(options.config, options.overrides)
    found = bench(config, steps=options.steps, say=_quiet if options.json else print)
    name = Path(options.config).stem
    path = options.output or Path(f"{name}-bench.png")
    plot(found, path, name)
    print(json.dumps(found.to_dict(), indent=1) if options.json else describe(found))
    if not options.json:
        print(f"picture: {path}")


def _quiet(text: str) -> None:
    """Says nothing."""
