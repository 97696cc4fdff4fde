import os
import shutil
import subprocess
import sys
import time

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data import cache


def build(folder):
    (folder / "part.bin").write_bytes(b"12345")
    return {"rows": 3}


def refuse(folder):
    (folder / "part.bin").write_bytes(b"12345")
    raise UserError("bad row")


def test_an_entry_is_built_once(tmp_path):
    folder, meta, found = cache.open_or_build(tmp_path, "k", build)
    assert (folder / "part.bin").read_bytes() == b"12345"
    assert (meta["rows"], found) == (3, False)
    _, meta, found = cache.open_or_build(tmp_path, "k", refuse)
    assert (meta["rows"], found) == (3, True)


def test_a_refused_build_leaves_nothing_not_even_the_folder(tmp_path):
    with pytest.raises(UserError, match="bad row"):
        cache.open_or_build(tmp_path / "new" / "deep", "k", refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "gone", "no meta", "bad meta"])
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    folder, _, _ = cache.open_or_build(tmp_path, "k", build)
    if damage == "cut":
        (folder / "part.bin").write_bytes(b"12")
    elif damage == "gone":
        (folder / "part.bin").unlink()
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text("{", encoding="utf-8")
    _, _, found = cache.open_or_build(tmp_path, "k", build)
    assert not found
    assert (folder / "part.bin").read_bytes() == b"12345"


SLOW = """
import sys, time
from pathlib import Path
from jaxlora.data import cache

def build(folder):
    (folder / "part.bin").write_bytes(b"123")
    print("building", flush=True)
    time.sleep(60)

cache.open_or_build(Path(sys.argv[1]), "k", build)
"""


def test_a_killed_build_leaves_no_usable_half(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "building\n"
        process.kill()
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [f".k.{process.pid}.tmp"]
    _, _, found = cache.open_or_build(tmp_path, "k", build)
    assert not found
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_a_living_build_of_another_process_is_left_alone(tmp_path):
    other = tmp_path / f".k.{os.getppid()}.tmp"
    other.mkdir()
    cache.open_or_build(tmp_path, "k", build)
    assert other.is_dir()


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="dataset_prepared_path"):
        cache.open_or_build(tmp_path / "file" / "cache", "k", build)


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path))
    assert cache.default_folder() == tmp_path / "datasets"
    monkeypatch.delenv("JAXLORA_CACHE")
    assert cache.default_folder().parts[-3:] == (".cache", "jaxlora", "datasets")


BUILD = """
import sys
from pathlib import Path
import jaxlora
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec
from jaxlora.data.tokenizer import load_tokenizer

tokenizer = load_tokenizer(Path(jaxlora.__file__).parent / "assets" / "tiny-llama")
print("building", flush=True)
options = DataOptions(64, dataset_prepared_path=sys.argv[2])
prepared = prepare([DatasetSpec(sys.argv[1], "completion")], [], options, tokenizer)
print(prepared.fingerprint, flush=True)
"""


@pytest.mark.reliability
def test_20_builds_killed_at_any_moment_leave_nothing_that_is_used(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "row {i:06d}"}}\n' for i in range(60_000)))
    command = [sys.executable, "-c", BUILD, str(rows)]

    def start(root):
        return subprocess.Popen([*command, str(root)], stdout=subprocess.PIPE, text=True)

    with start(tmp_path / "whole") as process:
        assert process.stdout.readline() == "building\n"
        began = time.monotonic()
        expected = process.stdout.readline()
        took = time.monotonic() - began
    assert len(expected.strip()) == 32
    interrupted = 0
    root = tmp_path / "cache"
    for trial in range(20):
        with start(root) as process:
            assert process.stdout.readline() == "building\n"
            time.sleep(took * (trial + 0.5) / 20)
            process.kill()
        left = [each.name for each in root.iterdir()] if root.exists() else []
        whole = [name for name in left if not name.startswith(".")]
        interrupted += not whole
        for name in whole:
            assert cache.read_meta(root / name) is not None
            shutil.rmtree(root / name)
    assert interrupted >= 10, "the kills came too late to say anything"
    with start(root) as process:
        assert process.stdout.readline() == "building\n"
        assert process.stdout.readline() == expected
    assert not [each for each in root.iterdir() if each.name.startswith(".")]
