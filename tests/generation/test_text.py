from pathlib import Path

import pytest

from jaxlora.data.chat import template_of
from jaxlora.data.new_tokens import NewTokens, extend_tokenizer
from jaxlora.data.tokenizer import load_tokenizer
from jaxlora.generation.text import answer_text, end_ids, pieces

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
TEXTS = [
    "Once upon a time, there was a cat.",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\U0001f468\u200d\U0001f469 fin",
    "\n\n  two  spaces\tand a tab \n",
    "\U0001f642",
]


@pytest.fixture(params=["bundled", "llama2", "mistral-v3"], scope="module")
def any_tokenizer(request, tokenizer):
    if request.param == "bundled":
        return tokenizer
    if not (SHARED / request.param).is_dir():
        pytest.skip(f"no {request.param} tokenizer here")
    return load_tokenizer(SHARED / request.param)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(any_tokenizer, text):
    prompt, ids = encode(any_tokenizer, "Say:"), encode(any_tokenizer, " " + text)
    found = list(pieces(any_tokenizer, ids, prompt))
    assert "".join(found) == answer_text(any_tokenizer, prompt, ids) == " " + text
    assert not any("\ufffd" in piece for piece in found)


def test_pieces_come_as_soon_as_they_are_whole(tokenizer):
    ids = encode(tokenizer, "a cat sat \U0001f642")
    taken = []

    def tokens():
        for token in ids:
            taken.append(token)
            yield token

    seen = [(piece, len(taken)) for piece in pieces(tokenizer, tokens())]
    words, smile = seen[:-1], seen[-1]
    assert [count for _, count in words] == list(range(1, len(words) + 1))
    assert smile == ("\U0001f642", len(ids))
    assert len(ids) > len(words) + 1  # the last character takes several tokens


def test_an_answer_cut_inside_a_character_shows_that_it_was(tokenizer):
    ids = encode(tokenizer, "ok \U0001f642")[:-1]
    found = list(pieces(tokenizer, ids))
    assert "".join(found) == tokenizer.decode(ids)
    assert "\ufffd" in found[-1]


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    ids = [*encode(tokenizer, "yes"), tokenizer.eos_token_id]
    assert answer_text(tokenizer, [], ids) == "yes"
    assert "".join(pieces(tokenizer, ids)) == "yes"
    assert answer_text(tokenizer, [], ids, special=True) == "yes" + tokenizer.eos_token


def test_end_ids_are_the_tokenizers_the_templates_and_more(tokenizer):
    eos = tokenizer.eos_token_id
    assert end_ids(tokenizer) == (eos,)
    assert end_ids(tokenizer, template_of(tokenizer)) == (eos,)
    assert end_ids(tokenizer, more=(7, eos, 5)) == tuple(sorted((eos, 5, 7)))


def test_the_end_of_a_turn_ends_an_answer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    new = NewTokens(further=("<|eot_id|>", "<|im_end|>"))
    llama3 = extend_tokenizer(load_tokenizer(tmp_path), new).tokenizer
    turn = llama3.convert_tokens_to_ids("<|eot_id|>")
    # The template never writes <|im_end|>, so that token is no end here.
    assert end_ids(llama3, template_of(llama3, "llama3")) == (llama3.eos_token_id, turn)
