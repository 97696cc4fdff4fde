"""A device that runs out of memory: one line with the plan's numbers and the cheapest change."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.planning import formula
from jaxlora.planning.account import account
from jaxlora.planning.advice import changes
from jaxlora.planning.estimate import Estimate
from jaxlora.planning.program import make_program
from jaxlora.planning.report import size
from jaxlora.planning.topology import parse


class OutOfMemory(UserError):
    """A run does not fit its devices."""

    exit_code = 4


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turns running out of a device's memory into one line.

    Args:
      config: of the run inside.

    Raises:
      OutOfMemory: in place of JAX's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # What the failed run held is held by its traceback.
        error.__traceback__ = None
        raise OutOfMemory(message(config)) from None


def message(config: Config) -> str:
    """Returns what a run needs, what there is, and the cheapest change that would make it fit."""
    try:
        made = _estimate(config)
    except Exception:  # no second error beside the one that is explained
        return (
            "a device ran out of memory; lower micro_batch_size (and raise "
            "gradient_accumulation_steps), or set gradient_checkpointing: true."
        )
    memory = made.memory
    parts = ", ".join(
        f"{name} {size(getattr(memory, name))}"
        for name in ("weights", "trained", "optimizer", "activations", "workspace")
        if getattr(memory, name)
    )
    limit = f" of {size(made.limit_bytes)}" if made.limit_bytes else ""
    text = f"out of memory: a step needs {size(memory.total)}{limit} on each device ({parts}); "
    if made.fits:
        text += "by plan that fits, so something else holds memory there; if not, "
    if not made.changes:
        return text + "nothing is left to save: more devices are needed (see jaxlora plan)."
    first = made.changes[0]
    saved = f"saves about {size(first.saves_bytes)}; {first.price}"
    more = "" if first.enough else ", and more (see jaxlora plan)"
    return text + f"cheapest change: {first.words} ({saved}){more}."


def _estimate(config: Config) -> Estimate:
    devices, here = jax.devices(), parse(None)
    try:
        made, _ = account(config, devices, here)
    except jax.errors.JaxRuntimeError:  # the compiler may need the device, which is full
        program = make_program(config, devices)
        made = formula.estimate(program, topology=here.text, hardware=here.hardware)
    if made.changes:
        return made
    # It did not fit in truth: what would halve it is worth trying.
    tight = dataclasses.replace(made, limit_bytes=made.memory.total // 2)
    found = changes(config, devices, tight, here.hardware.platform)
    return dataclasses.replace(made, changes=tuple(found))
