"""kill -9 anywhere, then resume: the adapter of the run that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

STEPS = 24
OPTIONS = {
    "lora_dropout": 0.2,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "val_set_size": 4,
    "eval_steps": 5,
    "max_steps": STEPS,
    "save_strategy": None,
    "save_steps": 3,
    "save_total_limit": 2,
}
# Steps of this size take milliseconds; slowed down, kills fall into all of them.
PROGRAM = """
import sys, time
from jaxlora.config.load import load_config
from jaxlora.data.batches import Batches
from jaxlora.training.loop import train
make = Batches.batch
def batch(self, step):
    time.sleep(float(sys.argv[2]))
    return make(self, step)
Batches.batch = batch
train(load_config(sys.argv[1]), quiet=True)
"""


def progress_of(folder):
    """Which process writes the metrics (each makes the file anew), and how many lines there are."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None, 0
    return path.stat().st_ino, len(path.read_text().splitlines())


def start(folder, keys, *, resume, pause, compiled):
    """Starts the run in a process of its own."""
    values = {**keys, **OPTIONS, "output_dir": str(folder), "resume_from_checkpoint": resume}
    config = folder.with_suffix(".yml")
    config.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", PROGRAM, str(config), str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def kill_often(folder, keys, kills, seed, compiled):
    """Kills the run so many times, each time some moments after it has got further."""
    rng = random.Random(seed)
    for lines in sorted(rng.sample(range(STEPS - 4), kills)):
        writer, _ = progress_of(folder)
        process = start(folder, keys, resume=folder.exists(), pause=0.1, compiled=compiled)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            now, reached = progress_of(folder)
            if now != writer and reached >= lines:
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors[-3000:]


def check_kills(keys, run, metrics_of, folder, kills, seed, compiled):
    whole = run("whole", **OPTIONS).output_dir
    kill_often(folder, keys, kills, seed, compiled)
    finish(start(folder, keys, resume=True, pause=0, compiled=compiled))
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert metrics_of(folder) == metrics_of(whole)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS


def test_a_killed_run_ends_in_the_same_adapter(keys, run, metrics_of, tmp_path):
    check_kills(keys, run, metrics_of, tmp_path / "killed", 2, 0, tmp_path / "compiled")


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_five_times_ends_in_the_same_adapter(keys, run, metrics_of, tmp_path, seed):
    check_kills(keys, run, metrics_of, tmp_path / "killed", 5, seed, tmp_path / "compiled")
