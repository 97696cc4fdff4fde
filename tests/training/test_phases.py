"""Each second of a run belongs to one phase."""

import contextlib
import time

import jax
import jax.numpy as jnp
import pytest

from jaxlora.training.phases import Phases


@pytest.fixture
def clocked():
    """Phases with a clock that is moved by hand."""
    now = [0.0]
    return Phases(clock=lambda: now[0]), now


def test_time_belongs_to_the_innermost_phase_and_sums_to_what_passed(clocked):
    phases, now = clocked
    now[0] = 1
    with phases("step"):
        now[0] = 3
        with phases("compile"):
            assert phases.current == "compile"
            now[0] = 7
        now[0] = 8
    phases.begin("other")
    now[0] = 10
    with contextlib.suppress(KeyError), phases("save"):
        now[0] = 14
        raise KeyError
    assert phases.seconds() == {"setup": 1, "step": 3, "compile": 4, "other": 2, "save": 4}
    assert sum(phases.seconds().values()) == 14


def test_the_first_call_compiles_and_later_ones_do_not(clocked, monkeypatch):
    phases, now = clocked
    order = []
    monkeypatch.setattr(
        "jaxlora.training.phases.release_freed_blocks", lambda: order.append("gives")
    )

    class Work:
        def __call__(self, seconds):
            order.append("runs")
            now[0] += seconds
            return seconds

        def lower(self, seconds):
            order.append("compiles")
            now[0] += 10
            return jax.jit(jnp.negative).lower(seconds)

    step = phases.compiling(Work())
    with phases("step"):
        assert [step(5.0), step(1.0), step(2.0)] == [5.0, 1.0, 2.0]
    assert phases.seconds() == {"setup": 0, "step": 3, "compile": 15}
    assert order == ["compiles", "gives", "runs", "runs", "runs"]


def test_what_is_compiled_before_the_first_call_is_not_compiled_again():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **more: compiled.append(more) if "backend_compile" in name else None
    )
    # A number of its own: no other test has compiled this.
    step = Phases().compiling(jax.jit(lambda x: x * 1.2345, donate_argnums=0))
    x = jax.block_until_ready(jnp.ones(7))
    compiled.clear()
    for _ in range(3):
        x = step(x)
    assert len(compiled) == 1


def test_the_usual_length_is_the_median_of_what_was(clocked):
    phases, now = clocked
    assert phases.usual_s("step") == 0
    for seconds in (1, 100, 2):
        with phases("step"):
            now[0] += seconds
    assert phases.usual_s("step") == 2


def test_a_run_says_what_its_time_went_to(run):
    started = time.monotonic()
    result = run(val_set_size=4, eval_steps=3, save_strategy=None, save_steps=2)
    wall = time.monotonic() - started
    assert {"setup", "compile", "data", "step", "eval", "save", "export"} <= result.seconds.keys()
    assert sum(result.seconds.values()) == pytest.approx(wall, rel=0.02, abs=0.05)
