"""Addresses and copies of what is on object storage."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from jaxlora.checkpoints import hub
from jaxlora.core.errors import UserError
from jaxlora.data.sources import digest, rows
from jaxlora.data.spec import DatasetSpec
from jaxlora.remote import fetch as fetching
from jaxlora.remote.fetch import fetch
from jaxlora.remote.location import exists, local_copy, open_storage, package_for


@pytest.fixture(autouse=True)
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def test_a_copy_is_made_once_and_again_when_the_original_changes(storage, monkeypatch):
    storage.pipe_file("/b/rows.jsonl", b"one")
    copied = []
    download = fetching.download
    monkeypatch.setattr(
        fetching, "download", lambda s, path, to: (copied.append(path), download(s, path, to))
    )
    assert fetch("memory://b/rows.jsonl", "k").read_bytes() == b"one"
    assert fetch("memory://b/rows.jsonl", "k").read_bytes() == b"one"
    assert len(copied) == 1
    storage.pipe_file("/b/rows.jsonl", b"two")  # of the same size
    assert fetch("memory://b/rows.jsonl", "k").read_bytes() == b"two"
    assert len(copied) == 2


def test_processes_of_a_machine_copy_once(storage, monkeypatch):
    """Also, none removes what another is about to put in its place."""
    for name in ("a", "b", "c"):
        storage.pipe_file(f"/b/model/{name}", b"x")
    copied, get_file = [], type(storage).get_file

    def slowly(self, path, target):
        copied.append(path)
        time.sleep(0.05)
        get_file(self, path, target)

    monkeypatch.setattr(type(storage), "get_file", slowly)  # each thread has one of its own
    with ThreadPoolExecutor(4) as pool:  # a lock belongs to what was opened, not to the process
        folders = list(pool.map(lambda _: fetch("memory://b/model", "k"), range(4)))
    assert sorted(copied) == ["/b/model/a", "/b/model/b", "/b/model/c"]
    assert {path.name for path in folders[0].iterdir()} == {"a", "b", "c"}


def test_what_is_gone_from_a_folder_is_not_read_any_more(storage):
    for name in ("a.jsonl", "sub/b.jsonl"):
        storage.pipe_file(f"/b/data/{name}", b'{"text": "x"}\n')
    assert len(list(rows(DatasetSpec("memory://b/data", type="completion")))) == 2
    storage.rm_file("/b/data/a.jsonl")
    assert len(list(rows(DatasetSpec("memory://b/data", type="completion")))) == 1


def test_rows_and_digest_are_those_of_a_local_file(storage, tmp_path):
    text = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "rows.jsonl").write_bytes(text)
    storage.pipe_file("/b/rows.jsonl", text)
    here = DatasetSpec(str(tmp_path / "rows.jsonl"), type="completion")
    there = DatasetSpec("memory://b/rows.jsonl", type="completion")
    assert [row for _, row in rows(here)] == [row for _, row in rows(there)]
    assert digest(here) == digest(there)


def test_data_files_choose_from_a_folder_there(storage):
    for name in ("a.jsonl", "b.jsonl"):
        storage.pipe_file(f"/b/data/{name}", f'{{"text": "{name}"}}\n'.encode())
    spec = DatasetSpec("memory://b/data", type="completion", data_files="b*.jsonl")
    assert [row for _, row in rows(spec)] == [{"text": "b.jsonl"}]


def test_of_a_model_only_what_it_needs_is_copied(storage):
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.json"):
        storage.pipe_file(f"/b/model/{name}", b"x")
    folder = hub.resolve("memory://b/model")
    assert {path.name for path in folder.glob("[!.]*")} == {"config.json", "model.safetensors"}


def test_a_plan_copies_the_description_of_a_base_and_no_weights(storage):
    for name in ("config.json", "model.safetensors"):
        storage.pipe_file(f"/b/model/{name}", b"x")
    folder = hub.resolve_config("memory://b/model")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_files_are_found_here_and_there(storage, tmp_path):
    (tmp_path / "x").write_text("")
    storage.pipe_file("/b/run/x", b"x")
    assert exists(str(tmp_path / "x"))
    assert exists("memory://b/run/x")
    assert not exists(str(tmp_path))
    assert not exists("memory://b/run")
    assert not exists("memory://b/run/y")


def test_a_copy_that_breaks_off_leaves_nothing(storage, monkeypatch):
    storage.pipe_file("/b/x.jsonl", b"0123456789")

    def broken(self, path, to, **options):
        with open(to, "wb") as file:
            file.write(b"01234")
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(storage), "get_file", broken)
    with pytest.raises(UserError, match="cannot be read: reset by peer"):
        fetch("memory://b/x.jsonl", "datasets")
    assert not any(path.is_file() for path in local_copy("memory://b").rglob("*"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://b/none", "k: memory://b/none does not exist, or holds no file"),
        ("s4://b/x", r"s4:// is no object storage .* expected gs://"),
        ("gs://", "is not the address"),
        ("gs://b/../../x", "is not the address"),
        ("gs://b//x", "is not the address"),
        ("s3://key:secret@b/x", "credentials do not belong in an address"),
    ],
)
def test_an_address_that_cannot_be_used_is_said_in_one_line(address, said):
    with pytest.raises(UserError, match=said) as caught:
        fetch(address, "k")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs"), ("az", "adlfs")])
def test_a_missing_package_is_named(scheme, package):
    assert package_for(f"{scheme}://b/x") == package
    with pytest.raises(UserError, match=f"needs the package {package}; pip install {package}"):
        open_storage(f"{scheme}://b/x")


def test_names_that_lead_out_of_the_folder_are_refused(storage):
    class Hostile:
        def invalidate_cache(self):
            pass

        def find(self, root, detail):
            return {f"{root}/../../escape": {"size": 1}}

    with pytest.raises(UserError, match="has a name that cannot be a file here"):
        fetching.list_files(Hostile(), "/b/data")


def test_urls_of_the_web_are_no_data():
    for url in ("http://127.0.0.1/rows.jsonl", "https://x/rows.jsonl", "ftp://x/rows.jsonl"):
        with pytest.raises(UserError, match="is a URL; download it"):
            list(rows(DatasetSpec(url)))


def test_no_credential_of_the_environment_is_in_a_message(monkeypatch):
    monkeypatch.setitem(os.environ, "AWS_SECRET_ACCESS_KEY", "canary-secret")
    with pytest.raises(UserError) as caught:
        fetch("s3://b/x", "k")
    assert "canary-secret" not in str(caught.value)
