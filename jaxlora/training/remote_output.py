"""A run whose output is on object storage: it works in a folder here, and goes up from it."""

import contextlib
import re
from collections.abc import Callable, Iterator

from jaxlora.checkpoints.remote import Mirror
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.parallel import processes
from jaxlora.remote.location import is_storage, local_copy

# An address of a run, of its checkpoints, or of one of them.
_CHECKPOINT = re.compile(r"(?P<run>.+?)(?P<inside>/checkpoints(/checkpoint-(?P<step>\d+))?)?/*")


def working_folder(config: Config) -> str:
    """Returns the folder that a run works in: `output_dir`, or what stands for it here."""
    if is_storage(config.output_dir):
        return str(local_copy(config.output_dir, "runs"))
    return config.output_dir


def open_mirror(config: Config) -> Mirror | None:
    """Returns what brings the run up, after bringing down what is there; None for a local run.

    All processes must call it; only process 0 gets one.

    Raises:
      UserError: the storage cannot be read, or holds something else.
    """
    if not is_storage(config.output_dir):
        return None
    found: list[Mirror] = []

    def pull() -> None:
        mirror = Mirror(config.output_dir, keep=config.save_total_limit)
        mirror.pull(_own_step(config, mirror.address))
        found.append(mirror)

    processes.on_first("pull", pull)
    return found[0] if found else None


def resume_path(config: Config) -> str | bool | None:
    """Returns `resume_from_checkpoint`; an address has become the path of its copy.

    Raises:
      UserError: the storage cannot be read.
    """
    wanted = config.resume_from_checkpoint
    if not isinstance(wanted, str) or not is_storage(wanted):
        return wanted
    run, inside, step = _parts(wanted)
    if run != config.output_dir.rstrip("/"):
        Mirror(run).pull(step)
    return f"{local_copy(run, 'runs')}{inside}"


@contextlib.contextmanager
def named_by_address(config: Config) -> Iterator[None]:
    """Errors speak of `output_dir`, not of the folder that stands for it."""
    try:
        yield
    except UserError as error:
        if not is_storage(config.output_dir):
            raise
        told = str(error).replace(working_folder(config), config.output_dir)
        raise UserError(told) from error


def push_all(config: Config, mirror: Mirror | None) -> None:
    """Brings up what has not gone up yet; all processes must call it."""
    if is_storage(config.output_dir):
        push: Callable[[], None] = mirror.push if mirror else lambda: None
        with processes.together("upload"):
            push()


def _own_step(config: Config, address: str) -> int | None:
    wanted = config.resume_from_checkpoint
    if not isinstance(wanted, str) or not is_storage(wanted):
        return None
    run, _, step = _parts(wanted)
    return step if run == address else None


def _parts(address: str) -> tuple[str, str, int | None]:
    match = _CHECKPOINT.fullmatch(address)
    assert match is not None, "any address matches"
    step = match["step"]
    return match["run"], match["inside"] or "", None if step is None else int(step)
