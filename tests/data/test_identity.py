import json

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data import prepare as module
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec


@pytest.fixture
def path(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def options(tmp_path):
    return DataOptions(sequence_len=32, dataset_prepared_path=str(tmp_path / "cache"))


def completion(path, **settings) -> DatasetSpec:
    return DatasetSpec(str(path), "completion", **settings)


def test_a_file_that_changes_while_it_is_read_is_refused(tokenizer, path, options, monkeypatch):
    real = module.scan

    def scan(spec):
        yield from real(spec)
        with path.open("a", encoding="utf-8") as file:
            file.write('{"text": "late"}\n')

    from jaxlora.data import prepare as prepare_module

    monkeypatch.setattr(prepare_module, "scan", scan)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare([completion(path)], [], options, tokenizer)
    monkeypatch.undo()
    assert prepare([completion(path)], [], options, tokenizer).report.train.examples == 21


def test_evaluating_on_the_training_data_is_refused(tokenizer, path, options):
    with pytest.raises(UserError, match=r"test_datasets: .* is training data too"):
        prepare([completion(path)], [completion(path)], options, tokenizer)
    parts = completion(path, split="train[:15]"), completion(path, split="train[15:]")
    assert prepare([parts[0]], [parts[1]], options, tokenizer).report.evaluation.examples == 5
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"copy\.jsonl .* is training data too"):
        prepare([completion(path)], [completion(copy)], options, tokenizer)


def test_counts_are_those_of_each_data_set_after_holding_out(tokenizer, path, options):
    import dataclasses

    specs = [completion(path), completion(path, split="train[:7]"), completion(path, shards=10)]
    assert prepare(specs, [], options, tokenizer).counts == (20, 7, 2)
    prepared = prepare(specs, [], dataclasses.replace(options, val_set_size=9), tokenizer)
    assert sum(prepared.counts) == 20 == len(prepared.train)
    first = [tokenizer.decode(prepared.train[i][0]) for i in range(prepared.counts[0])]
    assert first == sorted(first, key=lambda text: int(text[6:].split("<")[0]))


def test_a_missed_cache_says_what_differs_from_the_nearest_entry(
    tokenizer, path, options, monkeypatch
):
    import dataclasses

    from jaxlora.data import identity

    def missed(*specs, **changes):
        chosen = dataclasses.replace(options, **changes)
        return prepare(specs or [completion(path)], [], chosen, tokenizer).report.missed

    assert missed() == ()
    assert missed() == ()
    assert missed(sequence_len=64) == ("options.sequence_len: 64, was 32",)
    assert missed(completion(path, split="train[:5]")) == ("train[0].split: train[:5], was train",)
    path.write_text('{"text": "new"}\n', encoding="utf-8")
    assert missed() == ("the rows of train[0] (other content)",)
    code = {**identity.code_version(), "jaxlora.data": "other"}
    monkeypatch.setattr(identity, "code_version", lambda: code)
    assert missed() == ("the code of jaxlora that prepares data",)
