"""New tokens, in a byte-level tokenizer as Llama 3's and in one of SentencePiece's kind."""

import copy

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.new_tokens import NewTokens, extend_tokenizer
from jaxlora.data.tokenizer import Encoder, load_tokenizer, tokenizer_digest


def sentencepiece():
    """Characters, spaces as U+2581, bytes where there is no character."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<r0>", "<r1>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdeilmorstuw"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(params=["byte-level", "sentencepiece"])
def plain(request, tokenizer):
    return copy.deepcopy(tokenizer) if request.param == "byte-level" else sentencepiece()


def ids(tokenizer, text):
    return Encoder(tokenizer).ids([text], literal=False)[0]


def test_new_tokens_are_one_id_each_after_the_old_ones(plain, tmp_path):
    size, text = len(plain), ids(plain, "a dress")
    new = NewTokens({"pad_token": "[P]", "eos_token": "[E]"}, ("[F]",), ("<act>", "<see>"))
    made = extend_tokenizer(plain, new)
    names = ["[P]", "[E]", "<act>", "<see>", "[F]"]
    assert [made.tokenizer.convert_tokens_to_ids(name) for name in names] == list(
        range(size, size + 5)
    )
    assert made.added == made.named == set(range(size, size + 5))
    assert made.pad == {size}
    assert ids(made.tokenizer, "a dress") == text
    assert ids(made.tokenizer, "a<act>a")[1:-1].count(size + 2) == 1
    assert (made.tokenizer.pad_token, made.tokenizer.eos_token) == ("[P]", "[E]")
    # What is special can be kept out of a user's text, and is not decoded into an answer.
    encoder = Encoder(made.tokenizer)
    assert {"[E]", "[F]"} <= encoder.special_texts
    assert "<act>" not in encoder.special_texts
    made.tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == made.tokenizer.get_vocab()
    assert ids(again, "a<act>a[F]") == ids(made.tokenizer, "a<act>a[F]")


def test_a_known_token_is_not_new(plain):
    eos = plain.eos_token_id
    made = extend_tokenizer(plain, NewTokens({"pad_token": "</s>"}, plain=("<s>", "<new>")))
    assert made.known == ("<s>",)
    assert made.added == {len(made.tokenizer) - 1}
    assert made.tokenizer.pad_token_id == eos


def test_a_pad_token_that_is_also_learned_is_no_mere_filling(plain):
    made = extend_tokenizer(plain, NewTokens({"pad_token": "<z>", "eos_token": "<z>"}))
    assert made.pad == frozenset()
    assert len(made.added) == 1


def reserved(tokenizer):
    """Two tokens that nothing uses."""
    return sorted(
        tokenizer.convert_tokens_to_ids(text)
        for text in tokenizer.get_vocab()
        if text in ("<x>", "<y>", "<r0>", "<r1>")
    )


def test_reserved_tokens_take_new_texts(plain, tmp_path):
    first, second = reserved(plain)
    size, text, digest = len(plain), ids(plain, "a dress"), tokenizer_digest(plain)
    made = extend_tokenizer(plain, NewTokens(renamed={first: "<|act|>", second: "<|see|>"}))
    named = made.tokenizer
    assert ids(named, "<|see|><|act|>")[-2:] == [second, first]
    assert (len(named), made.added) == (size, frozenset())
    assert ids(named, "a dress") == text
    assert tokenizer_digest(named) != digest
    assert (named.bos_token, named.eos_token) == ("<s>", "</s>")
    named.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert ids(again, "<|act|>")[-1] == first
    assert named.decode([first, second], skip_special_tokens=False).split() != ["<r0>", "<r1>"]


def test_a_renamed_token_may_be_the_end_token(plain):
    first, _ = reserved(plain)
    new = NewTokens({"eos_token": "<|end|>"}, renamed={first: "<|end|>"})
    made = extend_tokenizer(plain, new)
    assert made.tokenizer.eos_token_id == first
    assert made.added == frozenset()


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (NewTokens({"padd_token": "<x>"}), 'special_tokens: padd_token .*"pad_token"'),
        (
            NewTokens(renamed={9999: "<n>"}),
            "added_tokens_overrides: 9999 is no added token.*one of",
        ),
        (NewTokens(renamed={20: "<n>"}), "added_tokens_overrides: 20 is no added token"),
        (NewTokens(renamed={3: "</s>"}), "added_tokens_overrides: </s> is token 2 already"),
    ],
)
def test_a_mistake_is_one_line(plain, new, message):
    with pytest.raises(UserError, match=message) as error:
        extend_tokenizer(plain, new)
    assert "\n" not in str(error.value)


def test_llama_2_grows_as_in_axolotl(llama2):
    made = extend_tokenizer(
        copy.deepcopy(llama2), NewTokens({"pad_token": "<pad>"}, plain=("<|im_start|>",))
    )
    assert made.tokenizer.convert_tokens_to_ids(["<pad>", "<|im_start|>"]) == [32000, 32001]
    assert ids(made.tokenizer, "a<|im_start|>user")[1] == 32001
