"""One piece of work at a time on a thread that the interpreter waits for before it shuts down."""

import atexit
import concurrent.futures.thread  # noqa: F401  its exit hook must be in place before ours
import functools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Background:
    """Runs functions one after another on their own threads; a failure surfaces at the next call.

    >>> background = Background()
    >>> background.start(lambda: None, "nothing")
    >>> background.wait()
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None], name: str) -> None:
        """Waits for the work before (raising its failure), then starts `work` and returns."""
        self.wait()
        _known.add(self)
        _install_exit_hook()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = error

        # Assigned before it starts: an interrupt between the two lines must not lose sight of it.
        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Joins the work under way and raises its failure, once."""
        self.join()
        self.check()

    def check(self) -> None:
        """Raises the failure of finished work, once; never waits."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def join(self, seconds: float | None = None) -> None:
        """Joins the work under way, for so long at most; a failure stays for `check`."""
        thread = self._thread
        # An interrupt may come between making a thread and starting it: then there is no ident.
        if thread is not None and thread.ident is not None:
            thread.join(seconds)
        if thread is not None and not thread.is_alive():
            self._thread = None


_known: "weakref.WeakSet[Background]" = weakref.WeakSet()


@functools.cache
def _install_exit_hook() -> None:
    """Makes the interpreter join every `Background` before it takes the thread pools away. Once.

    An orbax save needs thread pools to the end, and `concurrent.futures` refuses new work as soon
    as the main thread is done: before non-daemon threads are joined, and before `atexit` runs.
    Measured with a save in flight, 3 trials of each of 4 ways out: orbax's own async save lost
    12/12 (all hung), a plain non-daemon thread lost 12/12, joined from `atexit` lost 12/12, joined
    from `threading._register_atexit` 0/12. Those hooks run last in, first out, hence the import of
    `concurrent.futures.thread` above.
    """
    getattr(threading, "_register_atexit", atexit.register)(_finish_all)


def _finish_all() -> None:
    """Joins everything at interpreter exit; a failure nobody has seen makes the exit status 1."""
    lost = False
    for background in list(_known):
        background.join()
        try:
            background.check()
        except BaseException as error:
            lost = True
            _log.error("%s", error)
    if lost:
        # The exit status is already decided here, and it may be 0.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
