"""The command `plan`."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.cli.command import add_command
from jaxlora.core.errors import UserError

if TYPE_CHECKING:
    from jaxlora.config.schema import Config
    from jaxlora.planning.estimate import Estimate
    from jaxlora.planning.search import Found
    from jaxlora.planning.topology import Topology

_TEXT = (
    "Say what memory and time a run takes, by compiling it; needs neither weights nor data. "
    "The exit status is 0 if it fits, 1 if it does not."
)


def add_commands(commands: Any) -> None:
    """Adds the commands of this module."""
    plan = add_command(commands, "plan", _plan, _TEXT, config="plan")
    plan.add_argument(
        "--topology",
        metavar="CHIPS",
        help="v5e:4x4, v5p:2x2x4, v6e:2x4, 2xv5e:4x4 (two slices), h100:8, h200:8, a100:8, cpu or "
        "cpu:8; default: the devices that are here",
    )
    plan.add_argument("--json", action="store_true", help="print all of it as JSON")
    plan.add_argument(
        "--search", action="store_true", help="find the largest micro-batch and rows that fit"
    )
    plan.add_argument(
        "--efficiency",
        type=float,
        default=0.5,
        help="share of the hardware's limit that is reached, for tokens/s (default 0.5)",
    )
    plan.add_argument("--hlo", type=Path, metavar="FILE", help="write the compiled program here")


def _plan(options: argparse.Namespace) -> int:
    from jaxlora.config.load import load_config
    from jaxlora.planning.plan import plan
    from jaxlora.planning.report import describe
    from jaxlora.planning.topology import parse

    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency: {options.efficiency}; expected a share, 0.5 for a half.")
    config, topology = load_config(options.config, options.overrides), parse(options.topology)
    made = plan(config, topology, hlo=options.hlo)
    found = _search(config, topology, made) if options.search else []
    if options.json:
        rate = made.tokens_per_s(options.efficiency)
        searched = [{**dataclasses.asdict(x), "estimate": x.estimate.to_dict()} for x in found]
        extra = {"efficiency": options.efficiency, "tokens_per_s": rate, "search": searched}
        print(json.dumps(made.to_dict() | extra, indent=1))
    else:
        print(describe(made, options.efficiency, found))
    return 0 if made.fits else 1


def _search(config: "Config", topology: "Topology", made: "Estimate") -> "list[Found]":
    """The largest micro-batch with these rows, and the longest rows in a micro-batch of one."""
    from jaxlora.config import derived
    from jaxlora.planning.plan import plan
    from jaxlora.planning.search import largest

    if not made.limit_bytes:
        raise UserError(f"--search: the memory of {made.hardware.name} is unknown.")

    def measure(keys: dict[str, Any]) -> "Estimate":
        # One micro-batch: how often it is repeated changes nothing, and this compiles sooner.
        once = {"gradient_accumulation_steps": 1, "batch_size": None}
        if derived.remat_policy(config) == "auto":  # what fits at all fits with the last of it
            once |= {"remat": "full", "gradient_checkpointing": True}
        return plan(config.model_copy(update={**once, **keys}), topology)

    batch = largest(measure, "micro_batch_size", config.micro_batch_size)
    rows = largest(
        lambda keys: measure({"micro_batch_size": 1, **keys}),
        "sequence_len",
        config.sequence_len * max(batch.value, 1),
        step=512,
    )
    return [batch, rows]
