"""A save that was started is committed on every way out, and no kill makes a listed step bad."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from states import same_bits, state_of

from jaxlora.checkpoints.background import Background
from jaxlora.checkpoints.manifest import leaf_paths
from jaxlora.checkpoints.store import CheckpointStore

EXIT = """
import os, signal, sys, time
from states import state_of
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
from jaxlora.checkpoints.store import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save(1, state_of(1, 1 << 24), {})
match sys.argv[2]:
    case "sys.exit(0)":
        sys.exit(0)
    case "exception":
        raise ValueError("deliberate")
    case "KeyboardInterrupt":
        os.kill(os.getpid(), signal.SIGINT)
        while True:  # not signal.pause(): the saving thread may be the one that gets the signal
            time.sleep(0.01)
"""

LOOP = """
import sys
from states import state_of
from jaxlora.checkpoints.store import CheckpointStore
store = CheckpointStore(sys.argv[1], keep=2)
step = 0
if store.steps():
    step = store.restore(None, state_of(0, 1 << 18))[1]["step"]
while True:
    step += 1
    store.save(step, state_of(step, 1 << 18), {})
    store.wait()
    print(step, flush=True)
"""


def start(script, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **options)


def test_failure_surfaces_once_at_the_next_call():
    background = Background()
    background.start(lambda: 1 / 0, "division")
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.wait()
    background.check()


WAYS_OUT = {"end of script": 0, "sys.exit(0)": 0, "exception": 1, "KeyboardInterrupt": -2}


def _leave(folder, way):
    process = start(EXIT, folder, way, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == WAYS_OUT[way], errors
    assert CheckpointStore(folder).steps() == [1], errors
    state, _ = CheckpointStore(folder).restore(1, state_of(0, 1 << 24))
    assert same_bits(leaf_paths(state), leaf_paths(state_of(1, 1 << 24)))


@pytest.mark.parametrize("way", WAYS_OUT)
def test_save_in_flight_is_committed_on_the_way_out(tmp_path, way):
    _leave(tmp_path, way)


@pytest.mark.reliability
@pytest.mark.parametrize("way", WAYS_OUT)
def test_save_in_flight_is_committed_on_the_way_out_20_times(tmp_path, way):
    for trial in range(20):  # an exit race shows only now and then
        _leave(tmp_path / str(trial), way)


def _kill_repeatedly(folder, kills, seed):
    rng, committed = random.Random(seed), 0
    for _ in range(kills):
        process = start(LOOP, folder, stdout=subprocess.PIPE)
        # From the first commit on the loop does nothing but save, seal, rename and delete.
        committed = max(committed, int(process.stdout.readline()))
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        reported = process.communicate()[0].split("\n")[:-1]
        assert process.returncode == -signal.SIGKILL
        committed = max([committed, *map(int, reported)])
        store = CheckpointStore(folder)
        assert (store.latest() or 0) >= committed
        for step in store.steps():
            state, meta = store.restore(step, state_of(0, 1 << 18))
            assert meta == {"step": step}
            assert same_bits(leaf_paths(state), leaf_paths(state_of(step, 1 << 18)))
    assert committed >= kills


def test_kill_9_loses_no_committed_step_and_lists_no_bad_one(tmp_path):
    _kill_repeatedly(tmp_path, kills=6, seed=0)


@pytest.mark.reliability
def test_50_kills_lose_no_committed_step_and_list_no_bad_one(tmp_path):
    _kill_repeatedly(tmp_path, kills=50, seed=1)
