"""An estimate with advice, for devices that this process can compile for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.planning import compiled, formula
from jaxlora.planning.advice import changes
from jaxlora.planning.estimate import Estimate
from jaxlora.planning.ladder import climb_down, ladder_of, room_bytes
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

    def estimate(config: Config, *, compiles: bool = compiles) -> tuple[Estimate, str]:
        program = make_program(config, devices, topology.hardware.platform)
        known = {"topology": topology.text, "hardware": topology.hardware}
        if compiles:
            return compiled.estimate(program, **known)
        return formula.estimate(program, **known), ""

    if derived.remat_policy(config) == "auto":
        here = devices if topology.local else ()
        room = room_bytes(topology.hardware, here)
        config, made, text = _settled(config, estimate, room, ladder_of(topology.hardware.platform))
    else:
        made, text = estimate(config)
    if not made.fits:
        found = changes(config, devices, made, topology.hardware.platform)
        made = dataclasses.replace(made, changes=tuple(found))
    return made, text


def _settled(
    config: Config,
    estimate: Callable[..., tuple[Estimate, str]],
    room: int,
    policies: Sequence[str],
) -> tuple[Config, Estimate, str]:
    """A configuration with the policy that `auto` stands for, its estimate and its program."""
    made: dict[str, tuple[Estimate, str]] = {}

    def with_policy(remat: str) -> Config:
        settled = config.model_copy(update={"remat": remat})
        settled.model_fields_set.discard("gradient_checkpointing")  # it could contradict
        return settled

    def least(remat: str) -> int:
        return estimate(with_policy(remat), compiles=False)[0].memory.least

    def needed(remat: str) -> int | None:
        try:
            made[remat] = estimate(with_policy(remat))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or remat == policies[-1]:
                raise
            return None
        return made[remat][0].memory.total

    choice = climb_down(least, needed, room, policies)
    found, text = made[choice.remat]
    config = with_policy(choice.remat)
    return config, dataclasses.replace(found, remat_choice=choice.words), text
