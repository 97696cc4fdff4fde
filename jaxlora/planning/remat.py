"""`remat: auto` in a run that is about to start: compiled here, chosen once, kept."""

from collections.abc import Callable

import jax

from jaxlora.config import derived
from jaxlora.parallel import processes
from jaxlora.planning import answers, compiled, formula, ladder
from jaxlora.planning.estimate import Memory
from jaxlora.planning.hardware import Hardware, hardware_of
from jaxlora.planning.program import program_of
from jaxlora.training.setup import Plan


def choose(plan: Plan, say: Callable[[str], None]) -> None:
    """Gives the model of a run its remat policy, where the configuration leaves that open.

    What fits is compiled as the run will compile it, so that the run finds it in JAX's cache.
    Several processes compile together, as a compiler may ask; process 0 decides.

    Args:
      plan: the checked run; its transformer is changed.
      say: told in one line what was taken, and why.
    """
    transformer = plan.model.transformer
    if derived.remat_policy(plan.config) != "auto":
        return
    program = program_of(plan)
    mesh = plan.model.placement.mesh
    here = [device for device in mesh.devices.flat if device in jax.local_devices()]

    def by_formula(remat: str) -> Memory:
        transformer.remat = remat
        return formula.estimate(program, topology="", hardware=Hardware("", "", 0)).memory

    def by_compiler(remat: str) -> int | None:
        transformer.remat = remat
        return processes.exchange("remat", compiled.needed_bytes(program_of(plan)))[0]

    room = processes.on_first("room", lambda: ladder.room_bytes(hardware_of(here[0]), here))
    policies = ladder.ladder_of(mesh.devices.flat[0].platform)
    choice = ladder.obvious(lambda remat: by_formula(remat).total, room, policies[0])
    if choice is None:
        asked = answers.question(
            plan.config, program, room, {"segments": plan.batches.most_segments}
        )
        choice = _recalled(asked)
        if choice is None:
            choice = ladder.climb_down(
                lambda remat: by_formula(remat).least, by_compiler, room, policies
            )
            if processes.is_first():
                answers.remember(asked, choice)
    transformer.remat = choice.remat
    if plan.config.remat or choice.remat != policies[0]:  # asked for, or not as ever
        say(choice.words)


def _recalled(asked: str) -> ladder.Choice | None:
    """What process 0 finds."""

    def read() -> dict | None:
        found = answers.recall(asked)
        return None if found is None else found.to_dict()

    found = processes.on_first("remat", read)
    return None if found is None else ladder.Choice.from_dict(found)
