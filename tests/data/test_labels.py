"""Rows with a label become token ids, a label and where the second text starts."""

import json

import pytest

from jaxlora.data.labels import labelled_examples, labels_of
from jaxlora.data.spec import DataOptions, DatasetSpec, Labels
from jaxlora.data.tokenizer import Encoder


@pytest.fixture
def written(tmp_path):
    def write(*rows, **columns):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DatasetSpec(path=str(path), type="classification", **columns)

    return write


@pytest.fixture(scope="module")
def pairs():
    """A tokenizer of words, which marks the second text of a pair, and its end, by type 1."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate("<cls> <sep> <pad> a b c".split())}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[("<cls>", 0), ("<sep>", 1)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")


def test_a_second_text_starts_where_its_tokens_do(written, pairs):
    row = {"text": "a b", "other": "c a a", "label": 1}
    options = DataOptions(sequence_len=16, labels=Labels(2, ()))
    for column, wanted in (("other", 4), (None, 4)):
        spec = written(row, field_pair=column)
        ((_, (example,), why),) = labelled_examples(spec, options, Encoder(pairs))
        tokens, trained, label = example
        assert tokens.tolist() == ([0, 3, 4, 1, 5, 3, 3, 1] if column else [0, 3, 4, 1])
        assert not trained.any()
        assert label == (1, wanted)  # the length, where there is no second text
        assert why is None


def test_names_are_sorted_and_numbers_need_none(written):
    assert labels_of([written({"label": "b"}, {"label": "a"})], 2).names == ("a", "b")
    assert labels_of([written({"label": "1"}, {"label": 0})], 2).names == ()
    assert labels_of([written({"label": 1})], 2).names == ()
