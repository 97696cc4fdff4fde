"""A process that compiles for devices that are not here.

Reads ``{"topology": .., "config": values}`` as JSON from stdin, writes an estimate as JSON to
stdout, or ``{"error": ..}``. Compilers keep what they took and may end the process, so each program
has one of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.planning.account import account
from jaxlora.planning.plan import write_program
from jaxlora.planning.topology import devices_of, has_compiler, parse


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the estimate of a request."""
    topology = parse(request["topology"])
    config = load_config(request["config"])
    try:
        devices = devices_of(topology) if has_compiler(topology) else None
        made, text = account(config, devices or jax.devices(), topology, compiles=bool(devices))
    except UserError:
        raise
    except Exception as error:  # compiling for GPUs that are not here is no promise of JAX
        if topology.hardware_platform != "gpu":
            raise
        print(f"compiling for {topology.text} failed: {error}", file=sys.stderr)
        made, text = account(config, jax.devices(), topology, compiles=False)
    if path := request.get("hlo"):
        write_program(Path(path), text)
    return made.to_dict()


def main() -> None:
    """Answers one request."""
    try:
        found = answer(json.load(sys.stdin))
    except UserError as error:
        found = {"error": str(error)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
