import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.prepare import (
    DUPLICATE,
    EMPTY,
    NOTHING_TRAINED,
    TOO_LONG,
    TOO_SHORT,
    prepare,
)
from jaxlora.data.spec import DataOptions, DatasetSpec

SEGMENTS = {"type": "input_output"}


def segment_row(i: int, prompt: int = 4, answer: int = 3) -> dict:
    text = f"{i:04d}".ljust(prompt, "p")
    return {
        "segments": [{"label": False, "text": text}, {"label": True, "text": "a" * answer}],
    }


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def options(tmp_path):
    return DataOptions(sequence_len=32, dataset_prepared_path=str(tmp_path / "cache"))


def texts(table, tokenizer) -> list[str]:
    return [tokenizer.decode(table[i][0]) for i in range(len(table))]


def test_tables_and_report(tokenizer, tmp_path, options):
    specs = [
        DatasetSpec(write(tmp_path / "a.jsonl", [segment_row(i) for i in range(3)]), **SEGMENTS),
        DatasetSpec(write(tmp_path / "b.jsonl", [{"text": "hello"}]), "completion"),
    ]
    test = DatasetSpec(write(tmp_path / "t.jsonl", [segment_row(9)]), **SEGMENTS)
    calls = []
    prepared = prepare(
        specs, [test], options, tokenizer, progress=lambda rows, tokens: calls.append(rows)
    )
    assert texts(prepared.train, tokenizer) == ["0000aaa", "0001aaa", "0002aaa", "<s>hello</s>"]
    assert texts(prepared.evaluation, tokenizer) == ["0009aaa"]
    report = prepared.report
    assert [source.kept for source in report.train_sources] == [3, 1]
    assert report.test_sources[0].read == 1
    train = report.train
    assert (train.examples, train.tokens, train.trained_tokens, train.longest) == (4, 28, 15, 7)
    assert train.packing_efficiency is None
    assert isinstance(prepared.train.tokens, np.memmap)


def test_rows_that_come_again_are_left_out_of_both_tables(tokenizer, tmp_path, options):
    numbers = {"a": [0, 1, 0], "b": [1, 2], "t": [2, 3, 3]}
    a, b, t = (
        DatasetSpec(write(tmp_path / f"{name}.jsonl", map(segment_row, rows)), **SEGMENTS)
        for name, rows in numbers.items()
    )
    options = dataclasses.replace(options, deduplicate=True)
    prepared = prepare([a, b], [t], options, tokenizer)
    assert texts(prepared.train, tokenizer) == ["0000aaa", "0001aaa", "0002aaa"]
    assert texts(prepared.evaluation, tokenizer) == ["0003aaa"]
    reports = (*prepared.report.train_sources, *prepared.report.test_sources)
    assert [report.dropped for report in reports] == [{DUPLICATE: n} for n in (1, 1, 2)]
    assert all(report.kept + sum(report.dropped.values()) == report.read for report in reports)


def test_short_examples_are_left_out_and_counted(tokenizer, tmp_path, options):
    rows = [segment_row(0), segment_row(1, answer=9)]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), **SEGMENTS)
    longest = int(prepare([spec], [], options, tokenizer).train.lengths.max())
    longer = dataclasses.replace(options, min_sample_len=longest)
    prepared = prepare([spec], [], longer, tokenizer)
    assert len(prepared.train) == 1
    assert prepared.report.train_sources[0].dropped == {TOO_SHORT: 1}


@pytest.mark.parametrize(
    ("strategy", "kept", "dropped", "truncated"),
    [
        ("drop", 2, {TOO_LONG: 2, NOTHING_TRAINED: 1}, 0),
        ("truncate", 3, {NOTHING_TRAINED: 2}, 1),
        ("split", 4, {NOTHING_TRAINED: 1}, 0),
    ],
)
def test_kept_and_dropped_are_the_rows_read(
    tokenizer, tmp_path, options, strategy, kept, dropped, truncated
):
    rows = [
        segment_row(0),
        segment_row(1, prompt=30, answer=5),
        segment_row(2, prompt=40, answer=5),
        segment_row(3, answer=0),
        segment_row(4, prompt=16, answer=16),
    ]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), **SEGMENTS)
    options = dataclasses.replace(options, excess_length_strategy=strategy)
    [source] = prepare([spec], [], options, tokenizer).report.train_sources
    assert (source.read, source.kept, source.truncated) == (5, kept, truncated)
    assert source.dropped == dropped
    assert source.kept + sum(source.dropped.values()) == source.read
    assert source.divided == (2 if strategy == "split" else 0)


def test_split_rows_train_every_answer_token_once(tokenizer, tmp_path, options):
    spec = DatasetSpec(write(tmp_path / "a.jsonl", [segment_row(1, 20, 100)]), **SEGMENTS)
    options = dataclasses.replace(options, excess_length_strategy="split")
    table = prepare([spec], [], options, tokenizer).train
    assert max(table.lengths) == 32
    assert int(table.trained.sum()) == 100
    pieces = [tokenizer.decode(table[i][0]) for i in range(len(table))]
    # Each piece starts with the token before it.
    assert pieces[0] + "".join(piece[1:] for piece in pieces[1:]) == "0001" + "p" * 16 + "a" * 100


def test_long_completions_are_split_not_dropped(tokenizer, tmp_path, options):
    rows = [{"text": "x" * 100}, {"text": " "}, {"text": "short"}]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), "completion")
    prepared = prepare([spec], [], options, tokenizer)
    assert prepared.report.train_sources[0].dropped == {EMPTY: 1}
    # 100 characters and the end token, each learned once; likewise 5 and its end.
    assert prepared.report.train.trained_tokens == 101 + 6
    assert prepared.train.lengths.max() <= 32


@pytest.mark.parametrize(("size", "held"), [(0.1, 3), (0.11, 4), (5, 5)])
def test_validation_rows_are_held_out_of_training(tokenizer, tmp_path, options, size, held):
    rows = [{"text": f"row {i:02d} " + "x" * (40 if i % 3 == 0 else 0)} for i in range(30)]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), "completion")

    def split(seed: int):
        chosen = dataclasses.replace(options, val_set_size=size, seed=seed)
        prepared = prepare([spec], [], chosen, tokenizer)
        parts = []
        for table in (prepared.train, prepared.evaluation):
            parts.append([text for text in texts(table, tokenizer) if text.startswith("<s>row")])
        return prepared, *parts

    prepared, train, evaluation = split(1)
    names = Counter(text[:9] for text in [*train, *evaluation])
    assert names == Counter({f"<s>row {i:02d}": 1 for i in range(30)})
    assert len(evaluation) == held
    # A text of several examples is on one side whole: as many heads as tails.
    for table in (prepared.train, prepared.evaluation):
        found = texts(table, tokenizer)
        heads = sum(text.startswith("<s>row") for text in found)
        assert sum(text.endswith("</s>") for text in found) == heads
    assert split(1)[2] == evaluation
    assert split(2)[2] != evaluation


def test_packing_efficiency_is_reported(tokenizer, tmp_path, options):
    rows = [segment_row(i, prompt=4, answer=4) for i in range(8)]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), **SEGMENTS)
    packed = dataclasses.replace(options, sample_packing=True, val_set_size=4)
    report = prepare([spec], [], packed, tokenizer).report
    assert report.train.packing_efficiency == 1.0
    assert report.evaluation.packing_efficiency == 1.0
    apart = dataclasses.replace(packed, eval_sample_packing=False)
    assert prepare([spec], [], apart, tokenizer).report.evaluation.packing_efficiency is None


def test_the_cache_is_found_again_until_something_changes(tokenizer, tmp_path, options):
    import copy

    path = tmp_path / "a.jsonl"
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    spec = DatasetSpec(write(path, rows), "chat_template")
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"

    def cached(spec=spec, options=options, tokenizer=own) -> bool:
        return prepare([spec], [], options, tokenizer).report.cached

    assert [cached(), cached()] == [False, True]
    changes = {
        "option": {"options": dataclasses.replace(options, sequence_len=31)},
        "spec": {"spec": dataclasses.replace(spec, roles_to_train=("user", "assistant"))},
        "template": {"spec": dataclasses.replace(spec, chat_template="chatml")},
    }
    for change in changes.values():
        assert [cached(**change), cached(**change)] == [False, True]
    own.chat_template = own.chat_template.replace("</s>", "\n</s>")
    assert not cached()
    other = copy.deepcopy(own)
    other.pad_token = "<x>"
    assert not cached(tokenizer=other)
    write(path, [*rows, *rows])
    assert not cached()


def test_fingerprint_follows_the_data(tokenizer, tmp_path, options):
    path = tmp_path / "a.jsonl"
    spec = DatasetSpec(write(path, [segment_row(0)]), **SEGMENTS)
    first = prepare([spec], [], options, tokenizer).fingerprint
    assert prepare([spec], [], options, tokenizer).fingerprint == first
    write(path, [segment_row(1)])
    assert prepare([spec], [], options, tokenizer).fingerprint != first


LONG = segment_row(2, prompt=40)
BAD = {
    "empty file": ([], SEGMENTS, {}, "holds no row"),
    "all too long": ([LONG], SEGMENTS, {}, "no row of .*: 1 read, 1 longer than sequence_len"),
    "nothing trained": ([segment_row(0, answer=0)], SEGMENTS, {}, "1 read, 1 no trained token"),
    "all held out": ([segment_row(0)], SEGMENTS, {"val_set_size": 1}, "nothing would be left"),
    "wrong column": ([segment_row(0)], {"type": "alpaca"}, {}, r"a.jsonl:1: .* found: segments"),
    "late bad row": ([segment_row(0)] * 2 + [{}], SEGMENTS, {}, "a.jsonl:3: .* found: none"),
    "raise": ([LONG], SEGMENTS, {"excess_length_strategy": "raise"}, "a.jsonl:1: has 43 tokens"),
    "no template": ([{"messages": []}], {"type": "chat_template"}, {}, "the tokenizer has none"),
    "custom key": ([{}], {"type": {"feild": 1}}, {}, 'key "feild" is not known'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_and_leaves_nothing(tokenizer, tmp_path, options, case):
    rows, kind, settings, message = BAD[case]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), **kind)
    with pytest.raises(UserError, match=message) as error:
        prepare([spec], [], dataclasses.replace(options, **settings), tokenizer)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_contradicting_settings_are_refused(tokenizer, tmp_path, options):
    spec = DatasetSpec(write(tmp_path / "a.jsonl", [segment_row(0)]), **SEGMENTS)
    with pytest.raises(UserError, match="exclude each other"):
        prepare([spec], [spec], dataclasses.replace(options, val_set_size=0.5), tokenizer)
    with pytest.raises(UserError, match="datasets: none is given"):
        prepare([], [], options, tokenizer)


@pytest.mark.parametrize("sequential", [False, True])
def test_real_data_packs_at_98_percent_and_ends_every_answer(llama2, shared, options, sequential):
    options = dataclasses.replace(options, sample_packing_sequentially=sequential)
    spec = DatasetSpec(str(shared / "instructions" / "alpaca_en_demo.json"), "alpaca")
    options = dataclasses.replace(options, sequence_len=2048, sample_packing=True)
    prepared = prepare([spec], [], options, llama2)
    assert prepared.report.train_sources[0].kept == 999
    assert prepared.report.train.packing_efficiency >= 0.98
    last = prepared.train.offsets[1:] - 1
    assert (prepared.train.tokens[last] == llama2.eos_token_id).all()
    assert prepared.train.trained[last].all()
    first = prepared.train.offsets[:-1]
    assert (prepared.train.tokens[first] == llama2.bos_token_id).all()
    assert (prepared.train.tokens[first + 1] != llama2.bos_token_id).all()
