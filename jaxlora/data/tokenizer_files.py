"""Tokenizers of folders without tokenizer.json: a SentencePiece model or a tiktoken file."""

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError

_NAMES = ("tokenizer.model", "tiktoken.model")
_SPACE = "\u2581"
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Kinds of a piece (sentencepiece_model.proto).
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_UNIGRAM = 1
# What Meta's code adds to the 128,000 tokens of Llama 3's file, in this order.
_LLAMA3_TOKENS = 128_000
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def tokenizer_of_model_file(folder: Path) -> Any:
    """The fast tokenizer of a folder's tokenizer.model, or None where another file decides.

    Also None for a unigram model. The ids are SentencePiece's and tiktoken's own; names of special
    tokens, further tokens and the chat template are those of tokenizer_config.json.

    Raises:
        UserError: the file is neither a SentencePiece model nor a tiktoken file.
    """
    path = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if path is None or (folder / "tokenizer.json").is_file():
        return None
    content = path.read_bytes()
    settings = _settings(folder)
    ranks = _ranks(content)
    if ranks is not None:
        return _finished(*_tiktoken(ranks, settings, path), settings, path)
    try:
        read = _sentencepiece(content)
    except (struct.error, StopIteration, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is neither a SentencePiece model nor a tiktoken file: {error}."
        ) from error
    return None if read is None else _finished(*read, settings, path)


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                found |= json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path}: is not valid JSON: {error}.") from error
    template = folder / "chat_template.jinja"
    if template.is_file():
        found["chat_template"] = template.read_text(encoding="utf-8")
    return found


def _finished(
    backend: Any, names: Mapping[str, str], settings: Mapping[str, Any], path: Path
) -> Any:
    """A tokenizer with the names of its special tokens and the tokens that its file lacks."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    given = {name: _text(settings[name]) for name in _SPECIALS if settings.get(name)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **{**names, **given},
    )
    begin = tokenizer.bos_token
    added = settings.get("added_tokens_decoder", {})
    for number in sorted(map(int, added)):
        token = added[str(number)]
        options = {key: token.get(key, False) for key in ("single_word", "lstrip", "rstrip")}
        special = bool(token.get("special"))
        new: Any = AddedToken(token["content"], normalized=False, special=special, **options)
        tokenizer.add_tokens([new], special_tokens=special)
        got = tokenizer.convert_tokens_to_ids(token["content"])
        if got != number:
            raise UserError(
                f"{path}: tokenizer_config.json says that {token['content']} is token {number}, "
                f"but it is {got} here; the two files do not belong together."
            )
    if isinstance(begin, str) and settings.get("add_bos_token", True):
        _start_with(tokenizer.backend_tokenizer, begin)
    return tokenizer


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _ranks(content: bytes) -> dict[bytes, int] | None:
    """The tokens of a tiktoken file (base64 and rank a line), or None if it is none."""
    ranks = {}
    for line in content.splitlines():
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit():
            return None
        try:
            ranks[base64.b64decode(parts[0], validate=True)] = int(parts[1])
        except binascii.Error:
            return None
    return ranks or None


def _tiktoken(
    ranks: dict[bytes, int], settings: Mapping[str, Any], path: Path
) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        # transformers' needs a package to read the same lines.
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    backend = Converter(vocab_file=str(path)).converted()
    if settings.get("added_tokens_decoder"):
        return backend, {}
    if len(ranks) != _LLAMA3_TOKENS:
        raise UserError(
            f"{path}: a tiktoken file lacks the special tokens, and those of a file with "
            f"{len(ranks)} tokens are not known; put tokenizer_config.json beside it."
        )
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in _llama3_specials()]
    )
    names = {"bos_token": 0, "eos_token": 1, "pad_token": 4}
    return backend, {name: _LLAMA3_NAMED[at] for name, at in names.items()}


def _llama3_specials() -> Iterator[str]:
    reserved = 0
    for at in range(256):
        if at in _LLAMA3_NAMED:
            yield _LLAMA3_NAMED[at]
        else:
            yield f"<|reserved_special_token_{reserved}|>"
            reserved += 1


def _start_with(backend: Any, token: str) -> None:
    from tokenizers import processors

    number = backend.token_to_id(token)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


def _sentencepiece(content: bytes) -> tuple[Any, dict[str, str]] | None:
    """A BPE model of SentencePiece (Kudo and Richardson 2018); None where it is a unigram model.

    Those are left to transformers: the text of a control piece could not be kept apart from it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    fields = list(_fields(content))
    pieces = [_piece(value) for number, value in fields if number == 1]
    trainer = dict(_fields(next(value for number, value in fields if number == 2)))
    rules = dict(_fields(next(value for number, value in fields if number == 3)))
    prefixed = bool(rules.get(3, 1))
    unknown, fallback = trainer.get(40, 0), bool(trainer.get(35, 0))
    if trainer.get(3, _UNIGRAM) == _UNIGRAM:
        return None
    model = models.BPE(
        {text: number for number, (text, _, _) in enumerate(pieces)},
        _merges(pieces),
        unk_token=pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=fallback,
    )
    backend = Tokenizer(model)
    steps = [normalizers.Precompiled(rules[2])] if rules.get(2) else []
    if rules.get(4, 1):
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    # A space in front of the text, but not after a special token in the middle of it; where white
    # space is stripped, what comes first can no longer be told.
    scheme = ("always" if rules.get(4, 1) else "first") if prefixed else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    first = [decoders.Strip(content=" ", left=1)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    for text, _, kind in pieces:
        if kind in (_UNKNOWN, _CONTROL, _USER):
            special = kind != _USER
            token = AddedToken(text, normalized=False, special=special)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
    places = {"unk_token": unknown, "bos_token": trainer.get(41, 1)}
    places |= {"eos_token": trainer.get(42, 2), "pad_token": trainer.get(43, -1)}
    return backend, {n: pieces[at][0] for n, at in places.items() if 0 <= at < len(pieces)}


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to put two pieces together to a third, best score of the third first."""
    scores = {text: score for text, score, kind in pieces if kind == _NORMAL}
    found = [
        (score, text[:at], text[at:])
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    found.sort(key=lambda each: -each[0])
    return [(left, right) for _, left, right in found]


def _piece(content: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(content))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return fields[1].decode("utf-8"), score, fields.get(3, _NORMAL)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers as int, everything else as bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        size, at = _varint(content, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(content):
            raise ValueError("the file is cut short")
        yield number, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
