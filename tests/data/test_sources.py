import json

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.sources import digest, files, rows
from jaxlora.data.spec import DatasetSpec


@pytest.fixture
def folder(tmp_path):
    for name in ("train-0", "train-1", "test", "dev"):
        lines = (json.dumps({"name": name, "row": i}) for i in range(5))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    return tmp_path


def names(spec: DatasetSpec) -> list[str]:
    return [path.stem for path in files(spec)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["train-0", "train-1"]),
        ({"split": "test"}, ["test"]),
        ({"split": "validation"}, ["dev"]),
        ({"data_files": "dev.jsonl"}, ["dev"]),
        ({"data_files": ("test.jsonl", "train-*.jsonl")}, ["test", "train-0", "train-1"]),
    ],
)
def test_files_of_a_folder(folder, settings, expected):
    assert names(DatasetSpec(str(folder), **settings)) == expected


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [0, 1, 2, 3, 4]),
        ("train[:2]", [0, 1]),
        ("train[3:]", [3, 4]),
        ("train[1:3]", [1, 2]),
        ("train[-2:]", [3, 4]),
        ("train[:40%]", [0, 1]),
        ("train[40%:]", [2, 3, 4]),
    ],
)
def test_split_slices(folder, split, expected):
    spec = DatasetSpec(str(folder / "train-0.jsonl"), split=split)
    assert [row["row"] for _, row in rows(spec)] == expected


def test_digest_follows_the_bytes(folder):
    spec = DatasetSpec(str(folder))
    before = digest(spec)
    assert digest(spec) == before
    path = folder / "train-1.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("4", "5"), encoding="utf-8")
    assert digest(spec) != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "trian-0.jsonl"}, 'does not exist. Did you mean "train-0.jsonl"'),
        ({"path": ".", "data_files": "tset.jsonl"}, 'no file .* Did you mean "test.jsonl"'),
        ({"path": "train-0.jsonl", "split": "test"}, 'only the split "train"'),
        ({"path": ".", "split": "tets"}, 'no file of the split "tets".* Did you mean "test"'),
        ({"path": ".", "split": "train[a:b]"}, "not understood"),
        ({"path": "empty"}, "holds no data file"),
    ],
)
def test_what_is_not_there_is_named(folder, settings, message):
    (folder / "empty").mkdir()
    spec = DatasetSpec(**{**settings, "path": str(folder / settings["path"])})
    with pytest.raises(UserError, match=message):
        list(rows(spec))


def test_a_url_is_refused():
    with pytest.raises(UserError, match="is a URL"):
        list(rows(DatasetSpec("http://127.0.0.1/rows.jsonl")))


def test_hub_rows_come_through_datasets(monkeypatch):
    import datasets

    asked = {}

    def load(path, **settings):
        asked.update(path=path, **settings)
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = DatasetSpec("someone/rows", "completion", split="test[1:]", name="small")
    assert list(rows(spec)) == [("someone/rows[test]:row 2", {"text": "b"})]
    assert asked["split"] == "test"
    assert asked["name"] == "small"
    assert "trust_remote_code" not in asked


def test_a_hub_id_that_cannot_be_loaded_is_one_line(monkeypatch):
    import datasets

    def load(path, **settings):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"someone/rows is neither a local path nor .* no network"):
        list(rows(DatasetSpec("someone/rows")))
