"""Ctrl-C while training: a state is worth saving only between two steps."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """Holds the first Ctrl-C back until `check`; a second one ends at once, as ever.

    A step donates its state, so an exception in the middle of one leaves nothing to save. Off the
    main thread, or where another handler is installed, nothing is held back.
    """

    def __init__(self) -> None:
        self._pending = self._installed = False

    def __enter__(self) -> "Interrupts":
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
        self._restore()

    def _restore(self) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._installed = False
