"""A tokenizer as GGUF metadata, in the words of llama.cpp's convert_hf_to_gguf.py.

Two kinds: byte-level BPE (``gpt2``: tokens, merges and the name of a splitting rule that llama.cpp
has built in) and SentencePiece's BPE (``llama``: tokens and scores, of which llama.cpp merges the
best first; the merges of tokenizer.json are in that order, so their numbers serve as scores).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from jaxlora.core.errors import UserError

# llama.cpp's token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Splitting rules by the regular expression in tokenizer.json, as llama.cpp names them.
_SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_ENDS}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_ENDS}": "qwen2",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "tekken",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_fields(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Returns the metadata ``{key: value}`` that describes a transformers fast tokenizer.

    Args:
      tokenizer: from transformers; its Rust half says how it works.
      vocab_size: rows of the embedding; ids beyond the tokenizer's are filled up.

    Raises:
      UserError: a kind of tokenizer, or a splitting rule, that llama.cpp has no name for.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"the tokenizer's model is {model['type']}; GGUF files are written with BPE ones only."
        )
    sentencepiece = bool(model.get("byte_fallback"))
    fields: dict[str, Any] = {"tokenizer.ggml.model": "llama" if sentencepiece else "gpt2"}
    fields["tokenizer.ggml.pre"] = "default" if sentencepiece else _split_name(content)
    tokens, types = _tokens(tokenizer, model, vocab_size)
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    if sentencepiece:
        fields["tokenizer.ggml.scores"] = _scores(tokens, types, merges)
        fields["tokenizer.ggml.add_space_prefix"] = "Prepend" in json.dumps(content["normalizer"])
    else:
        # A space inside a part would end it.
        fields["tokenizer.ggml.merges"] = [
            " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge) for merge in merges
        ]
    return fields | _special_fields(tokenizer)


def _special_fields(tokenizer: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for ours, theirs in _SPECIAL.items():
        number = getattr(tokenizer, f"{ours}_token_id")
        if number is not None:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = int(number)
    ids = tokenizer("a")["input_ids"]
    fields["tokenizer.ggml.add_bos_token"] = ids[0] == tokenizer.bos_token_id
    fields["tokenizer.ggml.add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _split_name(content: Mapping[str, Any]) -> str:
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    rules = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if len(rules) == 1 and rules[0] in _SPLITS:
        return _SPLITS[rules[0]]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise UserError(
        "the tokenizer splits text by a rule that llama.cpp has no name for "
        f"({rules[0] if rules else ', '.join(map(str, kinds))}); a GGUF file would answer wrongly."
    )


def _tokens(
    tokenizer: Any, model: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(vocab_size):
        text = texts.get(number, f"[PAD{number}]")
        if number not in texts:
            kind = _UNUSED
        elif text == model.get("unk_token"):
            kind = _UNKNOWN
        elif number in added:
            kind = _CONTROL if added[number].special else _USER_DEFINED
        else:
            is_byte = model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text)
            kind = _BYTE if is_byte else _NORMAL
        if kind == _USER_DEFINED:
            text = text.replace("\u2581", " ")
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """Minus the number of the first merge that makes a token; what none makes comes last."""
    numbers: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        numbers.setdefault(left + right, number)
    last = float(len(merges))
    return [
        -float(numbers.get(token, last)) if kind == _NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
