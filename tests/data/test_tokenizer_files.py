import base64
import json

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.tokenizer import Encoder, load_tokenizer
from jaxlora.data.tokenizer_files import tokenizer_of_model_file

TEXTS = [
    *(
        "Hello there",
        "two  spaces",
        "line\nbreak\n\n\n",
        "\u4f60\u597d",
        "",
        "caf\u00e9 \U0001f600",
    ),
    *("\tTab  ", "123 4567", "a" * 20, "def f(x):\n    return x\n\n\n  # c", "say [INST] hi </s>"),
]


@pytest.fixture(scope="module")
def lines():
    return [
        "The quick brown fox jumps over the lazy dog.",
        "She sells sea shells by the sea shore, and the shells she sells are sea shells.",
        "A small model learns small words: the, and, she, sea, shell, fox, dog, hello, there.",
    ] * 20


def trained_model(folder, lines, **options):
    """A tiny SentencePiece model file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=9,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


KINDS = {
    "llama": {"model_type": "bpe", "normalization_rule_name": "identity"}
    | {"remove_extra_whitespaces": False, "vocab_size": 320, "byte_fallback": True},
    "gemma": {"model_type": "bpe", "normalization_rule_name": "identity", "vocab_size": 320}
    | {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True},
    "strips": {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True},
    "user defined": {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True}
    | {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    | {"user_defined_symbols": ["<x>", "[INST]"], "pad_id": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces_own(tmp_path, lines, kind):
    expected = trained_model(tmp_path, lines, **KINDS[kind])
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == expected.vocab_size()
    ids = Encoder(tokenizer).ids([*TEXTS, *lines[:3]])
    assert ids == [expected.encode(text) for text in [*TEXTS, *lines[:3]]]
    names = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert names == (expected.bos_id(), expected.eos_id(), expected.unk_id())
    assert tokenizer(lines[0])["input_ids"] == [expected.bos_id(), *expected.encode(lines[0])]
    assert tokenizer.decode(ids[-1]) == lines[2]


def test_a_unigram_model_is_left_to_transformers(tmp_path, lines):
    trained_model(tmp_path, lines, model_type="unigram", vocab_size=50)
    assert tokenizer_of_model_file(tmp_path) is None


def test_a_saved_copy_gives_the_same_ids(tmp_path, lines):
    trained_model(tmp_path, lines, **KINDS["llama"])
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert again.eos_token == "</s>"


def test_mistrals_ids_are_its_own_tools(shared):
    tokenizer = load_tokenizer(shared / "tokenizers/mistral-v3")
    for folder in (shared / "chat/mistral_samples").iterdir():
        for version in ("v2", "v3"):
            text = (folder / f"text_{version}.txt").read_text(encoding="utf-8")
            # How the samples show a space and a byte without a token of its own.
            text = text.replace("\u2581", " ").replace("<0x0A>", "\n")
            expected = json.loads((folder / f"tokens_{version}.json").read_text())["tokens"]
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_mistrals_ids_are_sentencepieces_own(shared):
    """Its model has pieces of several spaces, which tiny ones lack."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared / "tokenizers/mistral-v3"
    expected = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    found = Encoder(load_tokenizer(folder)).ids(TEXTS)
    assert found == [expected.encode(text) for text in TEXTS]


def test_names_further_tokens_and_template_come_from_the_config(tmp_path, lines):
    size = trained_model(tmp_path, lines, **KINDS["llama"]).vocab_size()
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<unk>",
        "add_bos_token": False,
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {
            "2": {"content": "</s>", "special": True},
            str(size): {"content": "<|im_end|>", "special": True},
        },
    }
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_id == size
    assert tokenizer.pad_token_id == 0
    assert tokenizer.chat_template == "{{ messages }}"
    assert Encoder(tokenizer).prefix == []
    assert tokenizer("the<|im_end|>")["input_ids"][-1] == size
    config["added_tokens_decoder"] = {str(size + 1): {"content": "<|im_end|>", "special": True}}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=f"is token {size + 1}, but it is {size} here"):
        load_tokenizer(tmp_path)


def tiktoken_file(folder, count=0):
    """Bytes and a few merges, then made-up tokens up to `count`; returns the ranks."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for text in ("th", "the", " t", " the", "he", "hel", "lo", "hello", "12", "123", "\n\n", "ca"):
        ranks[text.encode()] = len(ranks)
    while len(ranks) < count:
        ranks[b"\xff%d\xff" % len(ranks)] = len(ranks)
    coded = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("".join(coded), encoding="ascii")
    return ranks


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_ids_are_tiktokens_own(tmp_path, shared):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = tiktoken_file(tmp_path)
    end = {"added_tokens_decoder": {"268": {"content": "<|end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(end | {"eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    expected = tiktoken.Encoding(
        "tiny", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={"<|end|>": 268}
    )
    texts = [*TEXTS, "hello the cat, THE 12345\n\n x"]
    assert Encoder(tokenizer).ids(texts) == [expected.encode(text) for text in texts]
    assert tokenizer.eos_token_id == 268
    assert Encoder(tokenizer).prefix == []


def test_llama_3s_own_file_has_its_special_tokens(tmp_path, shared):
    tiktoken_file(tmp_path, count=128_000)
    tokenizer = load_tokenizer(tmp_path)
    config = json.loads((shared / "tokenizers/llama3-config/tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    assert len(added) == 256
    for number, token in added.items():
        assert tokenizer.convert_tokens_to_ids(token["content"]) == int(number)
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert Encoder(tokenizer).prefix == [128_000]


def test_a_file_without_its_special_tokens_is_refused(tmp_path):
    tiktoken_file(tmp_path)
    with pytest.raises(UserError, match="those of a file with 268 tokens are not known"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x0a\x7fshort", b"aGk= x\n", b"\xff" * 40])
def test_a_broken_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        UserError, match="neither a SentencePiece model nor a tiktoken file"
    ) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_json_goes_before(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert tokenizer_of_model_file(tmp_path) is None
