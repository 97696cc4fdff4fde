"""Work in forks of one process that has imported everything and touched no device.

A run then costs what it computes, not what Python imports, and every trial is still a process of
its own that can be killed. Windows (what a run is doing) are seen from outside in shared memory.
"""

import dataclasses
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

NAMES = (
    *("setup", "other", "data", "compile", "step", "eval", "save", "export"),  # phases of a run
    *("write", "delete", "restore"),  # of a checkpoint
)
_BACKGROUND = ("delete", "write")  # these go on while the run does other things
_WORDS = 4 * len(NAMES) + 1


class Windows:
    """How often each window was opened, when last, for how long in all; and which is open."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * _WORDS)

    def _put(self, word: int, value: float) -> None:
        self._memory[8 * word : 8 * word + 8] = struct.pack("d", value)

    def _get(self, word: int) -> float:
        return struct.unpack("d", self._memory[8 * word : 8 * word + 8])[0]

    def open(self, name: str) -> int:
        """Opens one; returns what was open before, for `close`."""
        word, before = 4 * NAMES.index(name), int(self._get(_WORDS - 1))
        self._put(word + 1, time.monotonic())
        self._put(word, self._get(word) + 1)
        self._put(word + 3, self._get(word + 3) + 1)
        self._put(_WORDS - 1, NAMES.index(name) + 1)
        return before

    def close(self, name: str, before: int) -> None:
        """Closes it again."""
        word = 4 * NAMES.index(name)
        self._put(word + 2, self._get(word + 2) + time.monotonic() - self._get(word + 1))
        self._put(word + 3, self._get(word + 3) - 1)
        self._put(_WORDS - 1, before)

    def count(self, name: str) -> int:
        return int(self._get(4 * NAMES.index(name)))

    def opened(self, name: str) -> float:
        return self._get(4 * NAMES.index(name) + 1)

    def mean_s(self, name: str) -> float:
        """Seconds it was open each time, on average."""
        return self._get(4 * NAMES.index(name) + 2) / max(self.count(name), 1)

    @property
    def now(self) -> str:
        """Which is open (or was, when its process died); "" for none."""
        for name in _BACKGROUND:
            if self._get(4 * NAMES.index(name) + 3):
                return name
        number = int(self._get(_WORDS - 1))
        return NAMES[number - 1] if number else ""


@dataclasses.dataclass(frozen=True)
class Aim:
    """Where a signal is to fall: `fraction` of `usual_s` after a window opened for the nth time."""

    window: str
    nth: int
    fraction: float
    usual_s: float
    number: int = signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a fork ended: status (negative: the signal), its output, and where the aim fell.

    after_s: seconds from the signal to the end; None where it ended before.
    """

    status: int
    output: str
    seconds: float
    window: str = ""
    after_s: float | None = None


def fork(
    work: Callable[[], int], windows: Windows, aim: Aim | None = None, limit_s: float = 900
) -> Ended:
    """Runs `work` in a fork, sends it the signal of `aim`, and waits for its end."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        started = time.monotonic()
        process = os.fork()
        if process == 0:
            _child(work, output.fileno())
        sent, window = None, ""
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            now = time.monotonic()
            if aim is not None and sent is None and _is_due(aim, windows, now):
                window, sent = windows.now, now
                os.kill(process, aim.number)
            if now - started > limit_s:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.001 if aim is not None and sent is None else 0.01)
        output.seek(0)
        code = os.waitstatus_to_exitcode(status)
        # Of a process that died at once the memory says more exactly where it was.
        window = windows.now if code == -signal.SIGKILL else window
        after = None if sent is None else time.monotonic() - sent
        text = output.read().decode(errors="replace")
        return Ended(code, text, time.monotonic() - started, window, after)


def _is_due(aim: Aim, windows: Windows, now: float) -> bool:
    opened = windows.opened(aim.window) + aim.fraction * aim.usual_s
    return windows.count(aim.window) >= aim.nth and now >= opened


def _child(work: Callable[[], int], output: int) -> None:
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def folder(root: Path, name: str) -> Path:
    """A new folder below `root`."""
    made = root / name
    made.mkdir(parents=True)
    return made
