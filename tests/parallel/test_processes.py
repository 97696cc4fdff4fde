"""Processes find each other, share what one of them knows, and fail together."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import loopback
import pytest

from jaxlora.core.errors import UserError
from jaxlora.parallel import processes


def test_two_processes_agree():
    program = str(Path(__file__).with_name("words.py"))
    done = loopback.run([[program, "{coordinator}", "2", str(i)] for i in range(2)])
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (json.loads(each.stdout.splitlines()[-1]) for each in done)
    assert [first["numbers"], second["numbers"]] == [[2, 0, True], [2, 1, False]]
    assert [first["called"], second["called"]] == [[0], []]
    assert [first["order"], second["order"]] == [0, 1]
    for said in (first, second):
        assert said["exchanged"] == [{"n": 0}, {"n": 1}]
        assert said["first"] == ["a", 1]
        assert said["highest"] == 11
        assert said["moved"][:2] == [True, ["nothing", "one piece", "second", "stacked"]]
        assert said["same"] is None
        assert said["differs"].startswith("learning_rate: 0.001 on process 0 and 0.002 on process")
    assert len(first["moved"][2]) == 6
    assert second["moved"][2] is None
    assert first["on_first"] == "the first has no file."
    assert second["on_first"] == "process 0: the first has no file."
    assert second["together"] == "the second has no file."
    # What was the failure of an earlier block is that of every later one: the run is over.
    assert first["together"] == "process 0: the first has no file."


class Store:
    """The coordination service's key-value store, as far as it is used here."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, overwrite=False):
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("no file."), "process 1: no file."),
        (ValueError("wrong"), "process 1: ValueError('wrong')"),
        (SystemExit(5), "process 1: SystemExit(5)"),
        (KeyboardInterrupt(), "process 1: KeyboardInterrupt()"),
    ],
)
@pytest.mark.parametrize("place", ["together", "on_first", "first_then_others"])
def test_the_others_are_told_whatever_ends_a_process(monkeypatch, place, error, told):
    store = Store()
    joined = SimpleNamespace(client=store, num_processes=2, process_id=1)
    monkeypatch.setattr(processes, "_joined", lambda: joined)
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "is_first", lambda: True)

    def work():
        raise error

    def inside():
        with processes.together("x"):
            work()

    call = inside if place == "together" else lambda: getattr(processes, place)("x", work)
    with pytest.raises(type(error)):
        call()
    assert list(store.values.values()) == [told]


def test_one_process_needs_nobody(monkeypatch):
    for name in (processes.COORDINATOR, processes.COUNT, processes.NUMBER):
        monkeypatch.delenv(name, raising=False)
    processes.join()
    assert (processes.count(), processes.number(), processes.is_first()) == (1, 0, True)
    assert processes.exchange("x", 1) == [1]
    assert processes.on_first("x", lambda: 2) == processes.first_then_others("x", lambda: 2) == 2
    assert processes.highest(3) == 3
    processes.require_same({"jax": 1})


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        (("h:1", None, None), {}, "--num-processes and --process-id: not given"),
        ((None, 2, None), {}, "--coordinator and --process-id: not given"),
        ((None, 2, 0), {processes.COUNT: "3"}, "--coordinator: not given"),
        ((None, None, None), {processes.NUMBER: "x"}, "JAX_PROCESS_ID: expected a whole number"),
    ],
)
def test_half_an_address_is_refused(given, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{message}"):
        processes.join(*given)


def test_processes_that_differ_are_told_in_what():
    program = str(Path(__file__).with_name("mismatches.py"))
    commands = [[program, "{coordinator}", "2", str(i)] for i in range(2)]
    done = loopback.run(commands, devices=[1, 2])
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (json.loads(each.stdout.splitlines()[-1]) for each in done)
    begins = {
        "config": "learning_rate: 0.0001 on process 0 and 0.0002 on process 1",
        "code": 'code of jaxlora: "code 0" on process 0 and "code 1" on process 1',
        "jax": 'version of jax: "0.0" on process 0 and "0.1" on process 1',
        "devices": "devices of a process: 1 on process 0 and 2 on process 1",
        "data": 'datasets (tokens and their order): "tokens 0" on process 0 and "tokens 1"',
    }
    for name, begin in begins.items():
        assert first[name] == second[name], "refused on all processes"
        assert first[name].startswith(begin), name
