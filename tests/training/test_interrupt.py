"""One signal ends a run where its state is whole; two end the process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from jaxlora.core.errors import UserError
from jaxlora.training.interrupt import SIGNALS, Interrupted, Interrupts

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


@pytest.fixture(autouse=True)
def _usual_handlers():
    """Background jobs inherit "ignore" for Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_at_once_and_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted) as raised, Interrupts():
        press(number)
    assert raised.value.exit_code == CODES[number]
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_held_signal_waits_for_the_check(number):
    done = []
    with Interrupts() as interrupts, interrupts.held():
        press(number)
        done.append("work")
        with pytest.raises(Interrupted) as raised:
            interrupts.check()
        interrupts.check()  # once
    assert raised.value.exit_code == CODES[number]
    assert done == ["work"]


def test_a_held_signal_comes_at_the_end_at_the_latest():
    with Interrupts() as interrupts:
        held = interrupts.held()
        held.__enter__()
        press(signal.SIGTERM)
        with pytest.raises(Interrupted):
            held.__exit__(None, None, None)


def test_an_exception_that_was_swallowed_comes_again_at_the_next_check():
    with Interrupts() as interrupts:
        with contextlib.suppress(Interrupted):
            press(signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupts.check()


def test_the_handler_of_somebody_else_stays():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        with Interrupts() as interrupts:
            press(signal.SIGTERM)
            interrupts.check()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [1]


def test_off_the_main_thread_nothing_is_changed():
    def enter():
        with Interrupts() as interrupts:
            handlers.append(signal.getsignal(signal.SIGTERM))
            interrupts.check()

    handlers = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


def test_several_processes_stop_for_the_signal_they_agree_on():
    asked = []

    def agree(pending):
        asked.append(pending)
        return signal.SIGTERM if len(asked) == 3 else 0

    with Interrupts() as interrupts, interrupts.held():
        interrupts.agree = agree
        interrupts.check()
        press(signal.SIGINT)
        interrupts.check()
        with pytest.raises(Interrupted) as raised:
            interrupts.check()
        interrupts.agree = None
    assert raised.value.exit_code == 143
    assert asked == [0, signal.SIGINT, signal.SIGINT]


def in_c_code(x):
    """As where a handler raises in Python code that C code has called, and that code goes on."""
    raise SystemError("returned a result with an exception set") from Interrupted(15)


@pytest.mark.parametrize("work", [in_c_code, jax.jit(in_c_code)], ids=["plain", "JAX's traceback"])
def test_an_interrupt_that_c_code_has_made_an_error_of_is_still_one(work):
    with pytest.raises(Interrupted) as caught, Interrupts():
        work(1.0)
    assert caught.value.exit_code == 143


def failing_while_it_stops():
    try:
        raise Interrupted(15)
    except Interrupted:
        raise UserError("no space left")  # noqa: B904


def broken():
    raise SystemError("another")


@pytest.mark.parametrize(
    ("work", "kind"), [(failing_while_it_stops, UserError), (broken, SystemError)]
)
def test_other_errors_stay_what_they_are(work, kind):
    with pytest.raises(kind), Interrupts():
        work()


# The long sleeps stand for a compilation: signals are noted and it goes on.
LONG_CALL = """
import sys, time
from jaxlora.training.interrupt import Interrupts
with Interrupts(grace_s=0.2) as interrupts:
    interrupts.rescue = lambda: print("rescued", flush=True)
    with interrupts.held():
        if sys.argv[1] == "unsaved":
            with interrupts.unsaved():
                print("ready", flush=True)
                time.sleep(1)
                print("saved", flush=True)
        else:
            print("ready", flush=True)
        time.sleep(20)
"""


def start(case):
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_CALL, case], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_main_thread_that_does_not_hear_is_saved_for_and_left():
    process = start("")
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out) == (143, b"rescued\n"), errors
    assert b"ended during a long call" in errors


def test_the_rescue_waits_for_the_step_under_way():
    process = start("unsaved")
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out) == (143, b"saved\nrescued\n"), errors


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(second):
    process = start("unsaved")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)  # two equal signals at the same moment are one
    process.send_signal(second)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out) == (CODES[second], b""), errors
