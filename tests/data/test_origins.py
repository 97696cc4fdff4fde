"""An example leads back to its row, whatever was dropped, held out or cut before it."""

import json
from pathlib import Path

import numpy as np

from jaxlora.data.origins import origins
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import DataOptions, DatasetSpec

WORDS = "red green blue cat dog house river stone seven eight".split()


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DatasetSpec(path=str(path), type="completion")


def test_examples_lead_to_their_lines(tmp_path, tokenizer):
    first = [f"{WORDS[i % 10]} {i}" for i in range(12)]
    first[3] = first[1]  # a duplicate
    first[5] = "word " * 40  # cut into several
    second = [f"other {i}" for i in range(6)]
    specs = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    options = DataOptions(
        sequence_len=16,
        deduplicate=True,
        val_set_size=4,
        dataset_prepared_path=str(tmp_path / "cache"),
    )
    prepared = prepare(specs, [], options, tokenizer)
    for number in range(len(prepared.train)):
        (place,) = origins(prepared.report, specs, [number])
        path, line = place.rsplit(":", 1)
        text = json.loads(Path(path).read_text().splitlines()[int(line) - 1])["text"]
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        own = [t for t in prepared.train[number][0].tolist() if t not in tokenizer.all_special_ids]
        assert set(own) <= set(tokens), (place, text)
    several = origins(prepared.report, specs, range(len(prepared.train)))
    assert len(several) == len(set(several)) == prepared.report.train_sources[0].read + 6 - 1 - 4
    assert several[0].startswith(str(tmp_path / "a.jsonl"))
    assert several[-1].startswith(str(tmp_path / "b.jsonl"))


def test_files_that_have_gone_leave_the_number_of_the_row(tmp_path, tokenizer):
    spec = write(tmp_path / "a.jsonl", ["one two", "three four"])
    options = DataOptions(sequence_len=16, dataset_prepared_path=str(tmp_path / "cache"))
    prepared = prepare([spec], [], options, tokenizer)
    (tmp_path / "a.jsonl").unlink()
    assert origins(prepared.report, [spec], np.arange(2).tolist()) == [
        "row 1 of the training data",
        "row 2 of the training data",
    ]
