"""An estimate with advice, for devices that this process can compile for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlora.config.schema import Config
from jaxlora.planning import compiled, formula
from jaxlora.planning.advice import changes
from jaxlora.planning.estimate import Estimate
from jaxlora.planning.program import make_program
from jaxlora.planning.topology import Topology


def account(
    config: Config, devices: Sequence[Any], topology: Topology, *, compiles: bool = True
) -> tuple[Estimate, str]:
    """Returns what a run takes, with what to change if it does not fit, and the program's text.

    Args:
      config: the run.
      devices: of the topology; any others, as many, where nothing is compiled.
      topology: what they are.
      compiles: whether there is a compiler for them; else the estimate is a formula's.
    """
    if compiles and not topology.local and topology.hardware.platform == "gpu":
        # cuDNN can only be compiled where the GPU is; chunks keep as little of attention.
        config = config.model_copy(update={"attn_implementation": "chunked"})
    program = make_program(config, devices, topology.hardware.platform)
    known = {"topology": topology.text, "hardware": topology.hardware}
    if compiles:
        made, text = compiled.estimate(program, **known)
    else:
        made, text = formula.estimate(program, **known), ""
    if not made.fits:
        found = changes(config, devices, made, topology.hardware.platform)
        made = dataclasses.replace(made, changes=tuple(found))
    return made, text
