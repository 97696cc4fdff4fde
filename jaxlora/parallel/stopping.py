"""Processes of one run end it at the same step, whichever of them a signal has reached."""

from typing import Any

import jax
from jax._src import distributed

_KEY = "jaxlora/stop"


class SharedStop:
    """Agrees with the other processes on where to stop.

    Each process calls it at the same places of the program, between which all have waited for each
    other (a step or a batch of an evaluation, whose numbers come from all). A process that a signal
    has reached names the place after the next: nobody can be there before its word is.

    Args:
      client: of the coordination service, whose key-value store needs no device.
    """

    def __init__(self, client: Any):
        self._client, self._place = client, 0

    def __call__(self, pending: int) -> int:
        """Takes the signal that has come here (0: none); returns the one to stop for now, or 0."""
        self._place += 1
        decided = self._decided()
        if pending and decided is None:
            try:
                self._client.key_value_set(_KEY, f"{self._place + 1} {pending}")
            except jax.errors.JaxRuntimeError:  # another process was first
                decided = self._decided()
        if decided is None:
            return 0
        place, number = decided
        return number if self._place >= place else 0

    def _decided(self) -> tuple[int, int] | None:
        try:
            place, number = self._client.key_value_try_get(_KEY).split()
        except jax.errors.JaxRuntimeError:  # nothing there
            return None
        return int(place), int(number)


def shared_stop() -> SharedStop | None:
    """Returns how the processes of this run agree, None where there is one."""
    # Of the run as it was joined (`jaxlora.parallel.processes`); the store has no public name.
    state = distributed.global_state
    several = state.client is not None and state.num_processes > 1
    return SharedStop(state.client) if several else None
