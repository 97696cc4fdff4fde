"""A process that compiles for devices that are not here.

Reads ``{"topology": .., "config": values}`` as JSON from stdin, writes an estimate as JSON to
stdout, or ``{"error": ..}``. Compilers keep what they took and may end the process, so each program
has one of its own.
"""

import json
import sys

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.planning.compiled import estimate
from jaxlora.planning.program import make_program
from jaxlora.planning.topology import devices_of, parse


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    topology = parse(request["topology"])
    try:
        devices = devices_of(topology)
        program = make_program(load_config(request["config"]), devices)
        made, text = estimate(program, topology=topology.text, hardware=topology.hardware)
        answer = made.to_dict()
        if path := request.get("hlo"):
            with open(path, "w") as file:
                file.write(text)
    except UserError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
