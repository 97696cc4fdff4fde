"""Processes of one run end together: a signal to one stops both, one that hangs ends the other."""

import itertools
import json
import os
import signal
import subprocess
import sys

import loopback
import pytest

from jaxlora.data.batches import Batches
from jaxlora.parallel import processes
from jaxlora.training.interrupt import Interrupts

# Which process sends itself which signal while it makes the batch of which step (from 0).
PROGRAM = """
import os, sys
from jaxlora.cli import main
from jaxlora.data.batches import Batches
mine, number, at = (int(word) for word in sys.argv[1:4])
make = Batches.batch
def batch(self, step, *rows):
    if self.shuffle and mine and step == at:
        os.kill(os.getpid(), number)
    return make(self, step, *rows)
Batches.batch = batch
sys.exit(main(["train", *sys.argv[4:]]))
"""
RUN = {"micro_batch_size": 2, "batch_size": 4, "max_steps": 6, "save_steps": 5}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def start(tmp_path, keys, environment):
    """``start(name, number, at, **keys)``: two processes, the second of which signals itself."""
    started = []

    def both(name, number, at=0, **changes):
        file = tmp_path / f"{name}.yml"
        changes = {"output_dir": str(tmp_path / name), "save_strategy": None, **changes}
        values = {**keys, **RUN, **changes}
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        address = f"127.0.0.1:{loopback.free_port()}"
        for process in range(2):
            signalled = str(int(bool(number) and process == 1))
            command = [sys.executable, "-c", PROGRAM, signalled, str(int(number)), str(at)]
            flags = ["--coordinator", address, "--num-processes=2", f"--process-id={process}"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(
                subprocess.Popen([*command, str(file), *flags], env=environment, **pipes)
            )
        return started[-2:]

    yield both
    for process in started:
        process.kill()
        process.communicate()


def steps(folder):
    return sorted(path.name for path in folder.glob("checkpoints/checkpoint-*"))


def statuses(processes):
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def test_processes_meet_between_any_two_places_where_they_may_stop(run, monkeypatch):
    """A step and a batch of an evaluation have numbers of all; `SharedStop` relies on it."""
    events = []

    def noting(event, function):
        return lambda *arguments: (events.append(event), function(*arguments))[1]

    monkeypatch.setattr(Interrupts, "check", noting("asks", Interrupts.check))
    monkeypatch.setattr(Batches, "batch", noting("meets", Batches.batch))
    monkeypatch.setattr(processes, "exchange", noting("meets", processes.exchange))
    options = {"val_set_size": 12, "eval_exact_match": True, "eval_max_new_tokens": 2}
    run(**options, eval_steps=2, max_steps=3, save_strategy="steps", save_steps=1)
    assert events.count("asks") >= 11
    assert ("asks", "asks") not in itertools.pairwise(events), events


def test_a_signal_to_one_process_stops_both_at_the_same_step(start, tmp_path):
    found, outputs = statuses(start("stopped", signal.SIGTERM, 1))
    assert found == [143, 143], outputs
    assert "saved: step 3" in outputs[0]
    assert steps(tmp_path / "stopped") == ["checkpoint-3"]


@pytest.mark.reliability
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_run_that_was_stopped_so_and_continued_is_the_run_that_was_not(
    start, tmp_path, metrics_of, at
):
    assert statuses(start("whole", 0))[0] == [0, 0]
    found, outputs = statuses(start("stopped", signal.SIGINT, at))
    assert found == [130, 130], outputs
    assert statuses(start("stopped", 0, resume_from_checkpoint=True))[0] == [0, 0]
    name = "adapter_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")


@pytest.mark.reliability
def test_a_peer_that_hangs_ends_the_run_with_75_and_it_continues(start, tmp_path):
    first, second = start("hangs", signal.SIGSTOP, 2, stall_timeout=5, save_steps=1)
    output, _ = first.communicate(timeout=600)
    assert first.returncode == 75, output
    (written,) = (tmp_path / "hangs").glob("stall-*.txt")
    assert "in phase step" in written.read_text()
    second.kill()
    assert steps(tmp_path / "hangs")[-1] == "checkpoint-2"
    assert statuses(start("hangs", 0, resume_from_checkpoint=True))[0] == [0, 0]
