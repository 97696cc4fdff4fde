"""Runs whose output, base model and data are on object storage: the same run, on any machine."""

import os
import random
import signal
import subprocess
import sys
import time

import fsspec
import pytest
import yaml

from jaxlora.core.errors import UserError

ADDRESS = "memory://bucket/run"
ADAPTER = "adapter_model.safetensors"
SAVES = {"save_strategy": None, "save_steps": 2, "lora_dropout": 0.2}


@pytest.fixture(autouse=True)
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "machine-a"))
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def names(storage) -> set[str]:
    return {path.removeprefix("/bucket/run/") for path in storage.find("/bucket/run")}


def test_everything_a_local_run_leaves_is_on_the_storage(run, storage):
    local = run("local", **SAVES).output_dir
    run("unused", output_dir=ADDRESS, **SAVES)
    files = (path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    kept = {name for name in files if not name.startswith(".")}
    same = {name for name in kept if "/state/" not in name}  # whose files have names of chance
    assert same == {name for name in names(storage) if "/state/" not in name}
    assert storage.cat_file(f"/bucket/run/{ADAPTER}") == (local / ADAPTER).read_bytes()
    written = yaml.safe_load(storage.cat_file("/bucket/run/config.yml"))
    assert written["output_dir"] == ADDRESS


def test_another_machine_continues_to_the_same_adapter(
    run, storage, tmp_path, monkeypatch, crash_at, metrics_of
):
    whole = run("whole", **SAVES).output_dir
    crash_at(5)
    with pytest.raises(RuntimeError, match="deliberate"):
        run("unused", output_dir=ADDRESS, **SAVES)
    assert ADAPTER not in names(storage)
    assert "checkpoints/checkpoint-4/manifest.json" in names(storage)
    crash_at(3)  # from here on the batches before the checkpoint are not asked for
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "machine-b"))
    result = run("unused", output_dir=ADDRESS, auto_resume_from_checkpoints=True, **SAVES)
    assert result.steps == 6
    assert storage.cat_file(f"/bucket/run/{ADAPTER}") == (whole / ADAPTER).read_bytes()
    assert metrics_of(result.output_dir) == metrics_of(whole)


def test_one_checkpoint_there_can_be_continued_elsewhere(run, storage, tmp_path, monkeypatch):
    run("unused", output_dir=ADDRESS, **SAVES)
    whole = storage.cat_file(f"/bucket/run/{ADAPTER}")
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "machine-b"))
    chosen = f"{ADDRESS}/checkpoints/checkpoint-4"
    result = run("local", resume_from_checkpoint=chosen, **SAVES)
    assert (result.output_dir / ADAPTER).read_bytes() == whole
    run("unused", output_dir=ADDRESS, resume_from_checkpoint=chosen, **SAVES)
    assert storage.cat_file(f"/bucket/run/{ADAPTER}") == whole


def test_an_address_that_holds_a_run_is_not_used_for_another(run):
    run("unused", output_dir=ADDRESS)
    with pytest.raises(UserError, match=f"output_dir {ADDRESS} already holds a run") as caught:
        run("unused", output_dir=ADDRESS)
    assert "machine-a" not in str(caught.value)


def test_a_checkpoint_that_is_not_there_is_named_by_its_address(run):
    with pytest.raises(UserError, match=f"resume_from_checkpoint: {ADDRESS}: no checkpoint there"):
        run("local", resume_from_checkpoint=ADDRESS)


def test_base_and_rows_may_be_there_too(run, storage, keys, base, rows):
    storage.put(f"{base}/", "/bucket/base/", recursive=True)
    storage.put_file(str(rows), "/bucket/rows.jsonl")
    local = run("local").output_dir
    data = [{**keys["datasets"][0], "path": "memory://bucket/rows.jsonl"}]
    far = run("far", base_model="memory://bucket/base", datasets=data).output_dir
    assert (far / ADAPTER).read_bytes() == (local / ADAPTER).read_bytes()


def test_storage_that_fails_ends_the_run_in_one_line(run, storage, monkeypatch):
    def never(self, *paths, **options):
        raise PermissionError("denied")

    monkeypatch.setattr("jaxlora.checkpoints.remote._ATTEMPTS", 1)
    monkeypatch.setattr(type(storage), "put_file", never)
    with pytest.raises(UserError, match=f"{ADDRESS}: denied") as caught:
        run("unused", output_dir=ADDRESS, **SAVES)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_told_before_the_first_step(
    run, storage, monkeypatch, crash_at
):
    def put_file(self, *paths, **options):  # as s3fs and gcsfs say it
        raise FileNotFoundError("The specified bucket does not exist")

    crash_at(0)
    monkeypatch.setattr(type(storage), "put_file", put_file)
    with pytest.raises(UserError, match=f"{ADDRESS}: cannot be written: The specified bucket"):
        run("unused", output_dir=ADDRESS, **SAVES)


# Uploads take a while, in small pieces, so that kills fall into them.
PROGRAM = """
import sys, time
from fsspec.implementations.local import LocalFileSystem
from jaxlora.config.load import load_config
from jaxlora.training.loop import train
def put_file(self, source, target, **options):
    self.makedirs(self._parent(target), exist_ok=True)
    content = open(source, "rb").read()
    with open(target, "wb") as file:
        for start in range(0, len(content), 1 + len(content) // 3):
            file.write(content[start : start + 1 + len(content) // 3])
            file.flush()
            time.sleep(0.01)
LocalFileSystem.put_file = put_file
train(load_config(sys.argv[1]), quiet=True)
"""


def newest(folder) -> int:
    """Step of the newest checkpoint of which anything has gone up."""
    return max((int(path.name[11:]) for path in folder.glob("checkpoints/*")), default=0)


@pytest.mark.reliability
def test_a_run_killed_while_it_uploads_ends_in_the_same_adapter(keys, run, tmp_path):
    options = {**SAVES, "max_steps": 40, "save_steps": 1, "save_total_limit": 2}
    whole = run("whole", **options).output_dir
    address = f"file://{tmp_path}/there"
    values = {**keys, **options, "output_dir": address, "auto_resume_from_checkpoints": True}
    config = tmp_path / "run.yml"
    config.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    rng, kills = random.Random(0), 0
    for attempt in range(7):
        env = {**os.environ, "JAXLORA_CACHE": str(tmp_path / f"machine-{attempt}")}
        before = newest(tmp_path / "there")
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(config)], env=env)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if attempt < 6 and newest(tmp_path / "there") > before:
                time.sleep(0.5 * rng.random())
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait(timeout=300)
    assert process.returncode == 0
    assert kills == 6
    assert (tmp_path / "there" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
