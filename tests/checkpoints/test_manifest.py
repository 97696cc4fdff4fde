"""Damage to any file of a checkpoint is noticed; the one before it is used and the user is told."""

import json
import random
import shutil

import pytest
from states import same_bits, state_of

from jaxlora.checkpoints.manifest import MANIFEST, DamagedCheckpoint, leaf_paths
from jaxlora.checkpoints.store import CheckpointStore
from jaxlora.core.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A store with the good steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    with CheckpointStore(folder) as store:
        store.save(1, state_of(1), {"note": "first"})
        store.save(2, state_of(2), {"note": "second"})
    return folder


def _flip(path, rng):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(b"x")


def _truncate(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if data else b"x")


def _zero(path, rng):
    data = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(data) - 64))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    path.write_bytes(data if any(path.read_bytes()[start : start + 64]) else b"x")


def _delete(path, rng):
    path.unlink()


def _replace(path, rng):
    other = rng.choice([p for p in path.parent.parent.rglob("*") if p.is_file() and p != path])
    path.write_bytes(other.read_bytes() + b"x")


@pytest.mark.parametrize("damage", [_flip, _truncate, _zero, _delete, _replace])
def test_damaged_file_is_never_restored_silently(saved, tmp_path, damage, caplog):
    rng = random.Random(damage.__name__)
    files = sorted(p.relative_to(saved) for p in (saved / "checkpoint-2").rglob("*") if p.is_file())
    for number, relative in enumerate(files * (1 if damage is _delete else 2)):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damage(folder / relative, rng)
        caplog.clear()
        store = CheckpointStore(folder)
        with pytest.raises(DamagedCheckpoint, match="checkpoint-2"):
            store.restore(2, state_of(0))
        state, meta = store.restore(None, state_of(0))
        assert meta == {"note": "first", "step": 1}, relative
        assert same_bits(leaf_paths(state), leaf_paths(state_of(1)))
        assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_no_good_checkpoint_left_is_an_error(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in (1, 2):
        (tmp_path / "run" / f"checkpoint-{step}" / MANIFEST).unlink()
    with pytest.raises(UserError, match="no good checkpoint"):
        CheckpointStore(tmp_path / "run").restore(None, state_of(0))


def test_run_goes_on_after_falling_back_and_replaces_the_damaged_step(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/checkpoint-2" / MANIFEST).unlink()
    with CheckpointStore(tmp_path / "run") as store:
        assert store.steps() == [1]
        store.restore(None, state_of(0))
        store.save(2, state_of(22), {})
    state, _ = store.restore(2, state_of(0))
    assert same_bits(leaf_paths(state), leaf_paths(state_of(22)))


def test_newer_format_is_refused_by_name_and_not_passed_over(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    monkeypatch.setattr("jaxlora.checkpoints.manifest.FORMAT", 2)
    with pytest.raises(UserError, match=r"checkpoint format 1, this jaxlora reads 2"):
        CheckpointStore(tmp_path / "run").restore(None, state_of(0))


def test_manifest_never_makes_us_read_outside_its_folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    target = next((tmp_path / "run/checkpoint-2/state").rglob("manifest.ocdbt"))
    target.unlink()
    target.symlink_to(tmp_path / "secret")
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        CheckpointStore(tmp_path / "run").restore(2, state_of(0))


def test_manifest_lists_leaves_files_and_meta_without_reading_arrays(saved):
    manifest = CheckpointStore(saved).describe(2)
    assert manifest.leaves["['optimizer'][0]['mu']"] == ((4096,), "bfloat16")
    assert manifest.meta["note"] == "second"
    raw = json.loads((saved / "checkpoint-2" / MANIFEST).read_text())
    assert raw["files"].keys() == manifest.files.keys()
