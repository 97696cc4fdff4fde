import numpy as np
import pytest

from jaxlora.data.encode import Pieces, Rendered, cut, encode
from jaxlora.data.tokenizer import Encoder


def test_drafts_of_both_kinds_keep_their_order(tokenizer):
    drafts = [
        Rendered("ab", ((1, 2),)),
        Pieces((("c", True),), bos=True, eos=False),
        Pieces((("d", True),), bos=False, eos=True, literal=False),
        Rendered("e", ()),
    ]
    found = encode(drafts, Encoder(tokenizer))
    assert [tokenizer.decode(tokens) for tokens, _ in found] == ["ab", "<s>c", "d</s>", "e"]


@pytest.mark.parametrize("name", ["tokenizer", "llama2"])
def test_spans_train_the_tokens_that_touch_them(request, name):
    tokenizer = request.getfixturevalue(name)
    text = "user: caf\u00e9 \u4f60? answer: caf\u00e9 \u4f60!</s> more"
    start, stop = text.index("caf\u00e9", 8), text.index(" more")
    [(tokens, trained)] = encode([Rendered(text, ((start, stop),))], Encoder(tokenizer))
    learned = tokenizer.decode(tokens[trained.astype(bool)]).strip()
    assert learned == "caf\u00e9 \u4f60!</s>"


def test_the_first_token_is_never_trained(tokenizer):
    [(_, trained)] = encode([Rendered("ab", ((0, 2),))], Encoder(tokenizer))
    assert trained.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["tokenizer", "llama2"])
def test_special_text_inside_a_literal_span_stays_text(request, name):
    tokenizer = request.getfixturevalue(name)
    text = "a</s>b</s>"
    [(tokens, trained)] = encode(
        [Rendered(text, ((1, 10),), literal=((0, 6),))], Encoder(tokenizer)
    )
    assert [i for i, token in enumerate(tokens.tolist()) if token == 2] == [len(tokens) - 1]
    assert trained[1:].all()
    assert tokenizer.decode(tokens) == text


def test_ends_train_every_end_token_that_the_template_wrote(tokenizer):
    text = "u</s>a</s>x</s>"
    draft = Rendered(text, ((5, 6),), literal=((10, 15),), ends=("</s>",))
    [(tokens, trained)] = encode([draft], Encoder(tokenizer))
    assert tokenizer.decode(tokens[trained.astype(bool)]) == "</s>a</s>"


def test_eos_is_appended_and_trained(tokenizer):
    [(tokens, trained)] = encode([Rendered("ab", (), eos=True)], Encoder(tokenizer))
    assert (tokens[-1], trained[-1]) == (2, 1)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 30])
def test_cut_pieces_train_every_token_exactly_once(count):
    tokens = np.arange(count, dtype=np.int32)
    trained = np.array([0] + [1] * (count - 1), np.uint8)
    pieces = cut((tokens, trained), 8)
    targets = [t for ids, mask in pieces for t in ids[mask.astype(bool)].tolist()]
    assert targets == list(range(1, count))
    assert all(0 < len(ids) <= 8 for ids, _ in pieces)
