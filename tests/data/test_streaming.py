import dataclasses
import json
import os
import subprocess
import sys

import pytest

from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec

COUNT = 5000


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "row {i:05d}"}}\n' for i in range(COUNT)))
    return path


@pytest.fixture
def options(tmp_path):
    return DataOptions(sequence_len=64, dataset_prepared_path=str(tmp_path / "cache"))


def stream(path, **settings) -> DatasetSpec:
    return DatasetSpec(str(path), "completion", streaming=True, **settings)


def texts(table, tokenizer) -> list[str]:
    return [tokenizer.decode(table[i][0], skip_special_tokens=True) for i in range(len(table))]


@pytest.mark.parametrize("wanted", [1, 1500, COUNT + 1])
def test_as_many_rows_are_read_as_there_are_examples_wanted(tokenizer, path, options, wanted):
    options = dataclasses.replace(options, stream_examples=wanted)
    prepared = prepare([stream(path)], [], options, tokenizer)
    count = min(wanted, COUNT)
    assert texts(prepared.train, tokenizer) == [f"row {i:05d}" for i in range(count)]
    assert prepared.report.train_sources[0].read == count


def test_packed_rows_need_tokens_and_their_plan_has_a_row_for_each_step(tokenizer, path, options):
    from jaxlora.data.batches import Batches

    options = dataclasses.replace(options, sample_packing=True, stream_tokens=12 * 64)
    table = prepare([stream(path)], [], options, tokenizer).train
    assert 12 * 64 <= len(table.tokens) < 12 * 64 + 64
    batches = Batches(table, sequence_len=64, rows=2, packing=True)
    assert batches.steps_per_epoch >= 6


@pytest.mark.parametrize(("weights", "counts"), [(None, (100, 0)), ((3, 1), (75, 25))])
def test_several_streams_are_read_in_order_or_in_their_shares(
    tokenizer, path, options, weights, counts
):
    options = dataclasses.replace(options, stream_examples=100, stream_weights=weights)
    specs = [stream(path), stream(path, split="train[100:]")]
    assert prepare(specs, [], options, tokenizer).counts == counts


def test_evaluation_data_is_read_whole(tokenizer, path, options):
    options = dataclasses.replace(options, stream_examples=3)
    test = DatasetSpec(str(path), "completion", split="train[:40]")
    prepared = prepare([stream(path, split="train[40:]")], [test], options, tokenizer)
    assert (len(prepared.train), len(prepared.evaluation)) == (3, 40)


def test_hub_data_is_streamed(tokenizer, path, options):
    # "json" is the hub library's own reader; it stands for a data set of the hub.
    spec = DatasetSpec("json", "completion", data_files=str(path), streaming=True)
    options = dataclasses.replace(options, stream_examples=3)
    prepared = prepare([spec], [], options, tokenizer)
    assert texts(prepared.train, tokenizer) == ["row 00000", "row 00001", "row 00002"]
    assert prepare([spec], [], options, tokenizer).report.cached


PEAK = """
import json, resource, sys
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec
from jaxlora.data.tokenizer import load_tokenizer

path, folder, cache, how = sys.argv[1:]
limit = 20000 if how == "streams" else None
options = DataOptions(sequence_len=64, dataset_prepared_path=cache, stream_examples=limit)
spec = DatasetSpec(path, "completion", streaming=limit is not None)
report = prepare([spec], [], options, load_tokenizer(folder)).report
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak / 1024, "examples": report.train.examples}))
"""


def peak(path, tokenizer, tmp_path, how: str) -> dict:
    """Peak memory in MiB of a process that prepares a file, and how many examples it made."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cache = tmp_path / f"cache of {path.stem}"
    command = [sys.executable, "-c", PEAK, path, tmp_path / "tokenizer", cache, how]
    done = subprocess.run([str(part) for part in command], capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.reliability
@pytest.mark.parametrize("how", ["streams", "reads all"])
def test_memory_does_not_grow_with_the_file(tokenizer, tmp_path, how):
    """TEST_BIG_MB says how large the file is: 200 by default, 1000 for a long test."""
    small, large = 4, int(os.environ.get("TEST_BIG_MB", "200"))
    found = {}
    line = json.dumps({"text": "x" * 40}) + "\n"
    for size in (small, large):
        path = tmp_path / f"{size}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(size):
                file.write(line * (1_000_000 // len(line)))
        found[size] = peak(path, tokenizer, tmp_path, how)
    growth = found[large]["peak"] - found[small]["peak"]
    # What is left grows with the examples kept: a few numbers of 8 bytes while they are counted.
    kept = (found[large]["examples"] - found[small]["examples"]) / 2**20
    assert growth <= 40 + kept * 60, found
    print(how, found)
