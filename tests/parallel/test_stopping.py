"""Whoever hears a signal first, all stop at the same place, which none has passed."""

import random

import jax
import pytest

from jaxlora.parallel.stopping import SharedStop


class Store:
    """The coordination service's key-value store, as far as it is used: the first word stands."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]


@pytest.mark.parametrize("seed", range(50))
def test_all_stop_at_the_same_place(seed):
    """Processes reach a place in any order, all of them before any reaches the one after it."""
    rng = random.Random(seed)
    store = Store()
    processes = [SharedStop(store) for _ in range(4)]
    heard = {p: rng.randrange(5, 9) for p in rng.sample(range(4), rng.randint(1, 4))}
    for place in range(1, 20):
        order = rng.sample(range(4), 4)
        said = [processes[p](15 if heard.get(p, 99) <= place else 0) for p in order]
        if any(said):
            break
    assert said == [15] * 4
    assert place == min(heard.values()) + 1


def test_without_a_signal_nobody_stops():
    stop = SharedStop(Store())
    assert [stop(0) for _ in range(5)] == [0] * 5
