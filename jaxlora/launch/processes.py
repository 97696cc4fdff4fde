"""Several processes of one run on this machine: their output, their signals, their end."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO

from jaxlora.core.errors import UserError

_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
Write = Callable[[str], object]


def free_port() -> int:
    """Returns a port of the loopback device that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_commands(config: str, overrides: Sequence[str], count: int) -> list[list[str]]:
    """Returns the command of each of `count` processes that train together on this machine.

    Raises:
      UserError: fewer than one.
    """
    if count < 1:
        raise UserError(f"--processes: {count}; expected 1 or more.")
    coordinator = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "jaxlora.cli", "train", config, *overrides]
    if count == 1:
        return [command]
    shared = [f"--coordinator={coordinator}", f"--num-processes={count}"]
    return [[*command, *shared, f"--process-id={number}"] for number in range(count)]


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    env: Mapping[str, str] | None = None,
    write: Write = sys.stdout.write,
    grace_s: float = 120.0,
) -> int:
    """Runs commands side by side until all have ended; returns the exit status of the whole.

    Each line of output comes with the number of its process. A signal is passed on to every
    process, once. Where one process fails the others are sent SIGTERM. What still runs `grace_s`
    after a signal is killed.

    Args:
      commands: program and arguments of each.
      env: their environment; None: this process's.
      write: takes whole lines.
      grace_s: seconds for a checkpoint.

    Returns:
      0 if all succeeded, else the status of the process that failed first (128 + n for signal n).
    """
    ended: queue.Queue[tuple[int, int | None]] = queue.Queue()
    environment = {**(os.environ if env is None else env), "PYTHONUNBUFFERED": "1"}
    processes: list[subprocess.Popen[str]] = []
    lock = threading.Lock()
    with _passed_on(processes) as stopping:
        try:
            for number, command in enumerate(commands):
                processes.append(_start(command, environment))
                arguments = (number, processes[-1], ended, write, lock)
                threading.Thread(target=_follow, args=arguments, daemon=True).start()
            return _wait(processes, ended, stopping, grace_s)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


class _Stopping:
    """Whether the processes were told to end, and since when."""

    def __init__(self) -> None:
        self.since: float | None = None

    def begin(self) -> None:
        self.since = self.since or time.monotonic()

    def left(self, grace_s: float) -> float | None:
        """Seconds until what still runs is killed; None: for ever."""
        return None if self.since is None else max(self.since + grace_s - time.monotonic(), 0)


@contextlib.contextmanager
def _passed_on(processes: list[subprocess.Popen[str]]) -> Iterator[_Stopping]:
    """Passes signals of this process on; they are in sessions of their own and get no other."""
    stopping = _Stopping()

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGUSR1, signal.SIGUSR2):
            stopping.begin()
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C reaches a whole group; a second signal would end a process that is saving.
            start_new_session=True,
        )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started: {error.strerror}.") from error


def _follow(
    number: int,
    process: subprocess.Popen[str],
    ended: "queue.Queue[tuple[int, int | None]]",
    write: Write,
    lock: threading.Lock,
) -> None:
    """Copies the lines of one process, then says that it has ended."""
    output: IO[str] | None = process.stdout
    assert output is not None
    try:
        for line in output:
            with lock:
                write(f"[{number}] {line}" if line.endswith("\n") else f"[{number}] {line}\n")
    except OSError:  # nobody reads any more: all are to save their state and end
        ended.put((number, None))
        for _ in output:
            pass
    ended.put((number, process.wait()))


def _wait(
    processes: Sequence[subprocess.Popen[str]],
    ended: "queue.Queue[tuple[int, int | None]]",
    stopping: _Stopping,
    grace_s: float,
) -> int:
    """Waits for all; after the first failure the others are ended. Returns the status."""
    failure, running = 0, len(processes)
    while running:
        try:
            _, status = ended.get(timeout=_soon(stopping.left(grace_s)))
        except queue.Empty:
            if stopping.left(grace_s) == 0:
                for process in processes:
                    process.kill()
            continue
        running -= status is not None
        if status != 0 and not failure:
            failure = _status(-signal.SIGPIPE if status is None else status)
            if stopping.since is None:
                stopping.begin()
                for process in processes:
                    if process.poll() is None:
                        process.terminate()
    return failure


def _status(status: int) -> int:
    """A shell's exit status: 128 + the number of the signal that ended a process."""
    return 128 - status if status < 0 else status


def _soon(left: float | None) -> float:
    """How long to wait at once: a signal may have set the end while we wait."""
    return 1.0 if left is None else min(max(left, 0.05), 1.0)
