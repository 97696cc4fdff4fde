"""One run over several processes: joining them, and agreeing on what only one of them can see.

Words go through the key-value store of `jax.distributed`, which needs neither devices nor equal
programs; arrays through the devices. With one process every function here is plain.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from jaxlora.core.errors import UserError

T = TypeVar("T")
AUTO = "auto"
# The names that launchers of JAX programs set.
COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_POLL_MS = 1000
_SHUTDOWN_S = 30  # how long a process that has ended waits for the others
_FAILED = "jaxlora/failed"
_calls = itertools.count()


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; does nothing where there is one.

    Must come before anything touches a device. What is not given is read from the environment:
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or JAX's own detection
    under SLURM and Open MPI, and on TPU slices of several hosts.

    Args:
      coordinator: ``host:port`` of process 0, or ``auto`` to let JAX find all three.
      num_processes: how many there are.
      process_id: the number of this one, from 0.

    Raises:
      UserError: some of the three are missing, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    given = {
        "--coordinator": coordinator or os.environ.get(COORDINATOR),
        "--num-processes": _number("--num-processes", num_processes, COUNT),
        "--process-id": _number("--process-id", process_id, NUMBER),
    }
    automatic = given["--coordinator"] == AUTO
    if all(value is None for value in given.values()):
        automatic = _under_a_launcher()
        if not automatic:
            return
    missing = [name for name, value in given.items() if value is None]
    if missing and not automatic:
        raise UserError(
            f"{' and '.join(missing)}: not given; a run of several processes needs --coordinator, "
            "--num-processes and --process-id, or --coordinator auto."
        )
    where = (None, None, None) if automatic else tuple(given.values())
    try:
        jax.distributed.initialize(*where, shutdown_timeout_seconds=_SHUTDOWN_S)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator {given['--coordinator'] or AUTO}: the processes could not be joined: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _number(flag: str, given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{variable}: expected a whole number, as {flag}, not {text!r}.") from None


def _under_a_launcher() -> bool:
    """Whether a launcher has started several processes of which this is one."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(os.environ.get(name, "1") not in ("", "1") for name in tasks)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return several or len(hosts) > 1 or bool(os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"))


def count() -> int:
    """Returns how many processes run together."""
    return _joined().num_processes if jax.distributed.is_initialized() else 1


def number() -> int:
    """Returns which of them this is, from 0."""
    return _joined().process_id if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that prints, writes and exports."""
    return number() == 0


def exchange(name: str, value: Any) -> list[Any]:
    """Returns the values (JSON) of all processes, by their numbers; all must call it.

    Raises:
      UserError: another process has failed in the meantime; its message.
    """
    if count() == 1:
        return [value]
    key = _key(name)
    _set(f"{key}/{number()}", value)
    return [_get(f"{key}/{process}") for process in range(count())]


def on_first(name: str, work: Callable[[], T]) -> T:
    """Returns what `work` returns (JSON) on process 0, to all; the others do not call it.

    Raises:
      UserError: what `work` raised there.
    """
    if count() == 1:
        return work()
    key = _key(name)
    if not is_first():
        return _get(key)
    with _failing_together():
        value = work()
    _set(key, value)
    return value


def first_then_others(name: str, work: Callable[[], T]) -> T:
    """Returns `work()`, called on process 0 before the others, who find what it left on the disk.

    Raises:
      UserError: what `work` raised here, or on process 0.
    """
    if count() == 1:
        return work()
    key = _key(name)
    if not is_first():
        _get(key)
        return work()
    with _failing_together():
        value = work()
    _set(key, True)
    return value


@contextlib.contextmanager
def together(name: str) -> Iterator[None]:
    """All processes leave the block, or none: a UserError of one is raised by all.

    >>> with together("settings"):
    ...     pass
    """
    if count() == 1:
        yield
        return
    with _failing_together():
        yield
    exchange(name, True)


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # whatever ends this process: the others wait for it
        if _failure() is None:
            text = str(error) if isinstance(error, UserError) else repr(error)
            _joined().client.key_value_set(_FAILED, f"process {number()}: {text}", True)
        raise


def require_same(facts: Mapping[str, Any]) -> None:
    """Compares facts (JSON) of all processes.

    Raises:
      UserError: on every process, names the first fact that differs and both values.
    """
    everyone = exchange("facts", dict(facts))
    for process, theirs in enumerate(everyone):
        for name in (*everyone[0], *(name for name in theirs if name not in everyone[0])):
            ours, other = (_shown(each.get(name)) for each in (everyone[0], theirs))
            if everyone[0].get(name) != theirs.get(name):
                raise UserError(
                    f"{name}: {ours} on process 0 and {other} on process {process}; every process "
                    "of a run needs the same."
                )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def highest(value: int) -> int:
    """Returns the largest of the processes' values; all must call it.

    Goes through the devices, in step with the programs that run there.
    """
    if count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def _key(name: str) -> str:
    # All processes make the same calls in the same order.
    return f"jaxlora/{next(_calls)}/{name}"


def _joined() -> Any:
    # The store has no public name; orbax reaches for it in the same way. Numbers are read here too:
    # `jax.process_count` starts the devices, which wait for those of the others.
    return distributed.global_state


def _set(key: str, value: Any) -> None:
    _joined().client.key_value_set(key, json.dumps(value))


def _failure() -> str | None:
    try:
        return _joined().client.key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:
        return None


def _get(key: str) -> Any:
    """Waits for as long as the others take: process 0 may tokenize for hours."""
    while True:
        try:
            return json.loads(_joined().client.blocking_key_value_get(key, _POLL_MS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise UserError(f"another process has ended: {str(error)[:200]}") from error
        if (failure := _failure()) is not None:
            time.sleep(0.1)  # let the one that failed speak first
            raise UserError(failure)
