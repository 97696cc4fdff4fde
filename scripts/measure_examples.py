"""How many configurations of a folder run as they are, and which keys block the others.

    python scripts/measure_examples.py axolotl/examples

Neither models nor data are needed: this is `jaxlora config check` over every YAML file, by kind.
"""

import argparse
import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.config.check import key
from jaxlora.config.load import examine_config
from jaxlora.core.errors import UserError

_PREFERENCE = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A file, what it trains, and the keys that block it; none means that it runs."""

    path: Path
    kind: str
    blocked_by: tuple[str, ...]


def measure(folder: Path) -> list[Outcome]:
    """Returns the outcome of every file with a `base_model`, by name."""
    paths = sorted(path for suffix in ("yml", "yaml") for path in folder.rglob(f"*.{suffix}"))
    found = []
    for path in paths:
        try:
            examined = examine_config(str(path))
        except UserError as error:
            found.append(Outcome(path, "unreadable", (str(error),)))
            continue
        if "base_model" in examined.values:
            blocked = dict.fromkeys(key(problem.path) for problem in examined.problems)
            found.append(Outcome(path, kind_of(examined.values), tuple(blocked)))
    return found


def kind_of(values: Mapping[str, Any]) -> str:
    """Returns what a configuration trains."""
    if values.get("processor_type"):
        return "images and sound"
    if values.get("rl"):
        return "preference" if values["rl"] in _PREFERENCE else "online reinforcement"
    if values.get("reward_model") or values.get("process_reward_model"):
        return "reward model"
    return "text"


def table(outcomes: list[Outcome]) -> str:
    """Returns how many run of each kind, then how many files each key blocks."""
    kinds = collections.Counter(outcome.kind for outcome in outcomes)
    runs = collections.Counter(outcome.kind for outcome in outcomes if not outcome.blocked_by)
    lines = [
        f"{kind}: {runs[kind]} of {count} run as they are ({runs[kind] / count:.0%})"
        for kind, count in kinds.most_common()
    ]
    blocks = collections.Counter(name for outcome in outcomes for name in outcome.blocked_by)
    lines += [f"{count:4} blocked by {name}" for name, count in blocks.most_common()]
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and with --files what blocks each file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", action="store_true", help="what blocks each file, too")
    options = parser.parse_args()
    outcomes = measure(options.folder)
    print(table(outcomes))
    if options.files:
        for outcome in outcomes:
            print(f"{outcome.path}: {', '.join(outcome.blocked_by) or 'runs'}")


if __name__ == "__main__":
    main()
