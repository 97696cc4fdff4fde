import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.table import TableWriter, TokenTable, check_vocabulary, count_trained, spans

EXAMPLES = [([1, 5, 2], [0, 1, 1]), ([7], [0]), ([3, 4], [0, 1])]


def written(folder) -> TokenTable:
    with TableWriter(folder) as writer:
        for tokens, trained in EXAMPLES:
            writer.add(np.array(tokens, np.int32), np.array(trained, np.uint8))
    return TokenTable.load(folder)


def test_a_written_table_equals_the_one_in_memory_and_is_mapped(tmp_path):
    table, memory = written(tmp_path / "t"), TokenTable.of(EXAMPLES)
    assert isinstance(table.tokens, np.memmap)
    for name in ("tokens", "trained", "offsets"):
        assert np.array_equal(getattr(table, name), getattr(memory, name))
        assert getattr(table, name).dtype == getattr(memory, name).dtype
    assert len(table) == 3
    assert [part.tolist() for part in table[2]] == [[3, 4], [0, 1]]
    with pytest.raises(IndexError):
        table[3]


@pytest.mark.parametrize("piece", [1, 3, 1 << 22])
def test_trained_tokens_are_counted_piece_by_piece(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("jaxlora.data.table._CHUNK", piece)
    table = written(tmp_path / "t")
    assert count_trained(tmp_path / "t") == table.trained.sum() == 3


def test_a_damaged_table_is_not_opened(tmp_path):
    written(tmp_path / "t")
    np.save(tmp_path / "t" / "trained.npy", np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="different lengths"):
        TokenTable.load(tmp_path / "t")


@pytest.mark.parametrize(("size", "bad"), [(7, 7), (5, 7), (8, None)])
def test_vocabulary_check(size, bad):
    table = TokenTable.of(EXAMPLES)
    if bad is None:
        check_vocabulary(table, size)
        return
    with pytest.raises(UserError, match=f"token id {bad}, .* {size} rows"):
        check_vocabulary(table, size)


def test_spans_join_to_the_text(tokenizer):
    ids = tokenizer.encode("Q? \u4f60 A!</s>")
    table = TokenTable.of([(ids, [0] * 8 + [1] * (len(ids) - 8))])
    assert spans(table, 0, tokenizer) == [("<s>Q? \u4f60 ", False), ("A!</s>", True)]


def test_spans_keep_the_space_that_a_lone_piece_would_lose(llama2):
    ids = llama2.encode("Hello there friend")
    table = TokenTable.of([(ids, [0, 0, 1, 1])])
    assert spans(table, 0, llama2) == [("<s> Hello", False), (" there friend", True)]
