"""Ends a run in which nothing happens any more: a stuck peer, device, disk or data source."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from jaxlora.training.phases import UNTIMED, Phases

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: worth trying again
_USUAL = 10  # times the usual length of what is going on


class StallGuard:
    """A thread that writes all stacks to a file and ends the process when a run stands still.

    It stands still when a phase shows no sign of life for `timeout_s`, or for 10 times what was
    usual in that phase if that is longer. Compilation and loading may take any time.

    Args:
      phases: of the run.
      timeout_s: seconds; 0 guards nothing.
      folder: where the file goes, ``stall-<process id>.txt``.
      settle: called before the end, to let other work finish; must not take long.
    """

    def __init__(
        self,
        phases: Phases,
        timeout_s: float,
        folder: Path,
        settle: Callable[[], None] = lambda: None,
    ):
        self._phases, self._timeout_s, self._folder, self._settle = (
            phases,
            timeout_s,
            folder,
            settle,
        )
        self._done = threading.Event()

    def __enter__(self) -> "StallGuard":
        if self._timeout_s:
            threading.Thread(target=self._watch, name="stall-guard", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()

    def _watch(self) -> None:
        tick = min(1.0, self._timeout_s / 10)
        beats, idle_s, last = -1, 0.0, time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            # A process that was stopped (Ctrl-Z, a debugger) has not stood still all the while.
            idle_s, last = idle_s + min(now - last, 2 * tick), now
            phase = self._phases.current
            if self._phases.beats != beats or phase in UNTIMED:
                beats, idle_s = self._phases.beats, 0.0
            elif idle_s > max(self._timeout_s, _USUAL * self._phases.usual_s(phase)):
                self._end(phase, idle_s)

    def _end(self, phase: str, idle_s: float) -> None:
        path = self._folder / f"stall-{os.getpid()}.txt"
        message = (
            f"no sign of life for {idle_s:.0f} s in phase {phase} (stall_timeout "
            f"{self._timeout_s:g} s); stacks in {path}; continue with resume_from_checkpoint: true"
        )
        try:
            with path.open("w") as file:
                file.write(f"{message}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # the disk may be what is stuck
            faulthandler.dump_traceback(all_threads=True)
        print(f"jaxlora: stalled: {message}", file=sys.stderr, flush=True)
        self._settle()
        os._exit(EXIT_CODE)
