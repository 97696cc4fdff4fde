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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shards": 2}, [0, 2, 4]),
        ({"shards": 2, "shards_idx": 1}, [1, 3]),
        ({"shards": 9, "shards_idx": 7}, []),
        ({"shards": 2, "split": "train[1:]"}, [1, 3]),
    ],
)
def test_shards_are_every_nth_row(folder, settings, expected):
    spec = DatasetSpec(str(folder / "train-0.jsonl"), **settings)
    assert [row["row"] for _, row in rows(spec)] == expected


def test_shards_are_the_whole_and_do_not_overlap(folder):
    specs = [DatasetSpec(str(folder), shards=3, shards_idx=i) for i in range(3)]
    found = [origin for spec in specs for origin, _ in rows(spec)]
    assert sorted(found) == sorted(origin for origin, _ in rows(DatasetSpec(str(folder))))
    with pytest.raises(UserError, match=r"shards_idx 3 of .* expected 0 to 2"):
        DatasetSpec("x", shards=3, shards_idx=3)


@pytest.mark.parametrize("name", ["rows", "rows.data", "rows.data.gz", "folder/rows"])
def test_ds_type_is_the_format_of_files_that_do_not_tell_it(tmp_path, name):
    import gzip

    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    text = b'{"a": 1}\n{"a": 2}\n'
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    root = path.parent if "/" in name else path
    assert [row["a"] for _, row in rows(DatasetSpec(str(root), ds_type="json"))] == [1, 2]
    with pytest.raises(UserError, match=r"ds_type says|holds no data file"):
        list(rows(DatasetSpec(str(root))))


def test_a_suffix_is_believed_before_ds_type(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n", encoding="utf-8")
    spec = DatasetSpec(str(tmp_path / "a.csv"), ds_type="json")
    assert [row for _, row in rows(spec)] == [{"text": "x"}]
