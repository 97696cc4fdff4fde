"""Ctrl-C and termination: a state is worth saving only between two steps.

The first signal ends the run at the next place where its state is whole; the second one ends the
process at once. A main thread that is inside a long call (a compilation, say) hears of signals
only afterwards; a thread of ours hears them at once, saves for it and ends the process.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

# SIGUSR1 is what SLURM can send some minutes before the end.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
GRACE_S = 5.0  # how long the main thread may take to hear of a signal


class Interrupted(KeyboardInterrupt):
    """A run ended by a signal; `exit_code` is 128 + its number: 130, 143, 138."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def _beneath(error: BaseException | None) -> Interrupted | None:
    """The interrupt that an error was made of.

    A handler's exception may come up in Python code that C code has called; numpy looks for a dtype
    in this way, goes on, and the interpreter calls that a SystemError.
    """
    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error


class Interrupts:
    """Turns signals into `Interrupted`: at once, or inside `held` at the next `check`.

    Off the main thread, and for signals that somebody else handles, nothing is changed.

    Args:
      grace_s: seconds after which the process ends without its main thread.

    Attributes:
      rescue: called then, from another thread; saves what there is.
      agree: takes the signal that has come (0: none) and returns the one to stop for, here and on
        every other process; None where there is no other.
    """

    def __init__(self, *, grace_s: float = GRACE_S):
        self.rescue: Callable[[], None] = lambda: None
        self.agree: Callable[[int], int] | None = None
        self._grace_s = grace_s
        self._pending, self._held = 0, False
        self._heard, self._whole = threading.Event(), threading.Lock()
        self._before: dict[int, Callable[..., object] | int | None] = {}
        self._reader, self._writer, self._wakeup = None, None, -1

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is not threading.main_thread():
            return self
        usual = (signal.SIG_DFL, signal.default_int_handler)
        free = [number for number in SIGNALS if signal.getsignal(number) in usual]
        self._before = {number: signal.signal(number, self._note) for number in free}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._heard.set()
        self._writer.close()  # the listening thread reads the end
        if isinstance(error, SystemError) and (interrupt := _beneath(error)):
            raise interrupt from None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, signals wait for a `check`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @contextlib.contextmanager
    def unsaved(self, *, when: bool = True) -> Iterator[None]:
        """Inside, the state is being changed or saved: `rescue` must wait."""
        with self._whole if when else contextlib.nullcontext():
            yield

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come (on any process, with `agree`)."""
        number = self._pending if self.agree is None else self.agree(self._pending)
        if number:
            self._pending = 0
            self._heard.set()
            raise Interrupted(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending = number
        # Several processes have to leave at the same place, which is a check.
        if not self._held and self.agree is None:
            self._heard.set()
            raise Interrupted(number)

    def _listen(self) -> None:
        assert self._reader is not None
        with self._reader:
            first = True
            while byte := self._reader.recv(1):
                if (number := byte[0]) not in self._before:
                    continue
                if not first:
                    self._end(number, "second signal: ending at once")
                first = False
                threading.Thread(target=self._late, args=(number,), daemon=True).start()

    def _late(self, number: int) -> None:
        if self._heard.wait(self._grace_s) or self.agree is not None:
            return  # several processes stop together or not at all
        with self._whole:
            if self._heard.is_set():
                return
            try:
                self.rescue()
            finally:
                self._end(number, "ended during a long call")

    def _end(self, number: int, why: str) -> None:
        print(f"jaxlora: {signal.Signals(number).name}: {why}", file=sys.stderr, flush=True)
        os._exit(128 + number)
