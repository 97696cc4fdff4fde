"""A run in which nothing happens ends and says where it stood; one that works is left alone."""

import os
import threading
import time

import pytest

from jaxlora.training import stall
from jaxlora.training.phases import Phases
from jaxlora.training.stall import StallGuard

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def exits(monkeypatch):
    """The exit codes asked for, and an event; the thread that asks ends instead."""
    codes, happened = [], threading.Event()

    def leave(code):
        codes.append(code)
        happened.set()
        raise SystemExit

    monkeypatch.setattr(stall.os, "_exit", leave)
    return codes, happened


@pytest.mark.parametrize("phase", ["step", "data", "save", "eval", "other"])
def test_a_phase_that_stands_still_ends_with_75_and_all_stacks(tmp_path, exits, phase, capsys):
    codes, happened = exits
    settled = []
    phases = Phases()
    with StallGuard(phases, 0.2, tmp_path, lambda: settled.append(1)), phases(phase):
        assert happened.wait(5)
    assert codes == [75]
    assert settled == [1]
    text = (tmp_path / f"stall-{os.getpid()}.txt").read_text()
    assert f"in phase {phase}" in text
    assert "test_a_phase_that_stands_still" in text  # the main thread's stack
    assert "_watch" in text  # and the others
    assert "stall_timeout 0.2" in capsys.readouterr().err


@pytest.mark.parametrize("phase", ["setup", "compile"])
def test_compilation_takes_the_time_it_takes(tmp_path, exits, phase):
    codes, _ = exits
    phases = Phases()
    with StallGuard(phases, 0.05, tmp_path), phases(phase):
        time.sleep(0.4)
    assert codes == []
    assert list(tmp_path.iterdir()) == []


def test_signs_of_life_and_zero_keep_a_run_alive(tmp_path, exits):
    codes, _ = exits
    phases = Phases()
    with StallGuard(phases, 0.2, tmp_path), phases("eval"):
        for _ in range(30):
            time.sleep(0.02)
            phases.beat()
    with StallGuard(phases, 0, tmp_path), phases("step"):
        time.sleep(0.3)
    assert codes == []


def test_what_is_usual_may_take_ten_times_as_long(tmp_path, exits, monkeypatch):
    codes, happened = exits
    phases = Phases()
    monkeypatch.setattr(phases, "usual_s", lambda name: 0.06 if name == "step" else 0.0)
    with StallGuard(phases, 0.1, tmp_path), phases("step"):
        assert not happened.wait(0.35)
        assert happened.wait(3)
    assert codes == [75]
