"""A process that compiles for devices that are not here.

Reads ``{"topology": .., "config": values}`` as JSON from stdin, writes an estimate as JSON to
stdout, or ``{"error": ..}``. Compilers keep what they took and may end the process, so each program
has one of its own.
"""

import json
import sys
from typing import Any

import jax

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.planning.account import account
from jaxlora.planning.topology import devices_of, has_compiler, parse


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the estimate of a request."""
    topology = parse(request["topology"])
    config = load_config(request["config"])
    compiles = has_compiler(topology)
    devices = devices_of(topology) if compiles else jax.devices()
    made, text = account(config, devices, topology, compiles=compiles)
    if path := request.get("hlo"):
        with open(path, "w") as file:
            file.write(text)
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
