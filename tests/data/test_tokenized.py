import json

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import TOKENIZED, DataOptions, DatasetSpec
from jaxlora.data.tokenized import tokenized

ROW = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "attention_mask": [1, 1, 1]}


def test_rows_are_taken_as_they_are(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    options = DataOptions(8, train_on_inputs=True, dataset_prepared_path=str(tmp_path / "cache"))
    table = prepare([DatasetSpec(str(path), TOKENIZED)], [], options, tokenizer).train
    tokens, trained = table[0]
    assert tokens.tolist() == [5, 6, 7]
    assert trained.tolist() == [0, 1, 0]


@pytest.mark.parametrize("mask", [[1, 1, 0], [0, 1, 1]])
def test_padding_at_either_end_is_left_out(mask):
    ids = [id_ for id_, real in zip(ROW["input_ids"], mask, strict=True) if real]
    assert tokenized(ROW | {"attention_mask": mask}, "f:1", vocabulary=8).ids == tuple(ids)


BAD = {
    "no ids": ({"instruction": "x"}, 'needs the column "input_ids".*set type, unless'),
    "no labels": ({"input_ids": [1]}, 'needs the column "labels"'),
    "text": (ROW | {"input_ids": "5 6 7"}, '"input_ids" is 5 6 7; expected a list'),
    "float": (ROW | {"labels": [-100, 6.0, 7]}, "expected a list of whole numbers"),
    "bool": (ROW | {"attention_mask": [True] * 3}, "expected a list of whole numbers"),
    "lengths": (ROW | {"labels": [6]}, "have 3, 1 and 3 entries"),
    "range": (ROW | {"input_ids": [5, 6, 8]}, "entry 3 of input_ids is 8; the tokenizer has 8"),
    "negative": (ROW | {"input_ids": [-1, 6, 7]}, "entry 1 of input_ids is -1"),
    "label": (ROW | {"labels": [6, 7, -100]}, "entry 1 of labels is 6; expected -100 .* 5"),
    "mask": (ROW | {"attention_mask": [1, 2, 1]}, "entry 2 of attention_mask is 2"),
    "gap": (ROW | {"attention_mask": [1, 0, 1]}, "has a gap"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(case):
    row, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        tokenized(row, "rows.jsonl:7", vocabulary=8)
    assert str(error.value).startswith("rows.jsonl:7:")
    assert "\n" not in str(error.value)
