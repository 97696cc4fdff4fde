"""`jaxlora launch --on local`: real processes that train together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import PROMPT, write_base, write_rows

from jaxlora.config.load import load_config
from jaxlora.training.loop import train

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def keys(tmp_path, write_tiny_llama) -> dict:
    return {
        "base_model": str(write_base(write_tiny_llama, tmp_path / "base")),
        "datasets": [{"path": str(write_rows(tmp_path / "rows.jsonl", 24)), "type": PROMPT}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 64,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }


def launch(keys: dict, folder: Path, compiled: Path, **changes) -> subprocess.Popen[str]:
    """Starts two processes; each has one CPU device."""
    file = folder.with_suffix(".yml")
    file.write_text(json.dumps({**keys, "output_dir": str(folder), **changes}))
    command = [sys.executable, "-m", "jaxlora.cli", "launch", str(file), "--on", "local"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    env |= {"JAXLORA_CACHE": str(compiled.with_name("cache"))}
    return subprocess.Popen([*command, "--processes=2"], env=env, stdout=subprocess.PIPE, text=True)


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_two_processes_train_as_one_and_write_to_object_storage(keys, tmp_path):
    config = load_config({**keys, "micro_batch_size": 4, "output_dir": str(tmp_path / "one")})
    one = train(config, quiet=True).output_dir
    changes = {"micro_batch_size": 2, "output_dir": f"file://{tmp_path}/two"}
    process = launch(keys, tmp_path / "two", tmp_path / "compiled", **changes)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "[0] step 4/4" in output
    # float32, four steps; the sums of two devices are added in another order.
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=2e-5)
    assert (tmp_path / "two" / ADAPTER).is_file()
    assert (tmp_path / "two/checkpoints/checkpoint-4/manifest.json").is_file()


@pytest.mark.reliability
def test_a_launch_that_is_told_to_stop_saves_and_continues(keys, tmp_path):
    changes = {"micro_batch_size": 2, "max_steps": 30, "auto_resume_from_checkpoints": True}
    compiled, folder = tmp_path / "compiled", tmp_path / "stopped"
    whole = launch(keys, tmp_path / "whole", compiled, **changes)
    assert whole.wait(timeout=600) == 0
    process = launch(keys, folder, compiled, **changes)
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    reached = len(losses(folder))
    assert 3 <= reached < 30
    assert (folder / f"checkpoints/checkpoint-{reached}").is_dir(), "no step is lost"
    assert launch(keys, folder, compiled, **changes).wait(timeout=600) == 0
    assert (folder / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
