"""New tokens in a tokenizer: special ones, plain ones, and new texts for reserved ones."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean

_FURTHER = "additional_special_tokens"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Where a tokenizer writes the texts of its tokens.
_WRITTEN = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What a configuration adds to a tokenizer.

    Attributes:
      special: texts of special tokens by name, ``{"pad_token": "<pad>"}``.
      further: texts of special tokens without a name.
      plain: texts of tokens that are not special.
      renamed: new texts for tokens that the tokenizer reserves, by id.
    """

    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    further: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    renamed: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Extended:
    """A tokenizer with new tokens.

    Attributes:
      tokenizer: may be another object than the one that was given.
      added: ids of the tokens that were not in its vocabulary.
      named: ids of all tokens that were asked for, known or not.
      pad: ids of those that only fill up rows, which are never learned.
      known: texts of `NewTokens.plain` that were in the vocabulary before.
    """

    tokenizer: Any
    added: frozenset[int]
    named: frozenset[int]
    pad: frozenset[int]
    known: tuple[str, ...]


def extend_tokenizer(tokenizer: Any, new: NewTokens) -> Extended:
    """Adds tokens to a transformers fast tokenizer, in Axolotl's order.

    Raises:
      UserError: an unknown name of a special token, an id that is not reserved, a text in use.
    """
    from transformers import AddedToken

    def as_written(text: str) -> Any:
        return AddedToken(text, rstrip=False, lstrip=False, normalized=False)

    for name in new.special:
        if name not in _SPECIAL:
            near = did_you_mean(name, (*_SPECIAL, _FURTHER))
            raise UserError(f"special_tokens: {name} is not known.{near}")
    if new.renamed:
        tokenizer = _renamed(tokenizer, new.renamed)
    before = tokenizer.get_vocab()
    for name, text in new.special.items():
        tokenizer.add_special_tokens({name: as_written(text)})
    if new.plain:
        tokenizer.add_tokens([as_written(text) for text in new.plain])
    if new.further:
        tokenizer.add_special_tokens({_FURTHER: [as_written(text) for text in new.further]})
    vocabulary = tokenizer.get_vocab()
    learned = {text for name, text in new.special.items() if name != "pad_token"}
    learned |= {*new.further, *new.plain}
    pad = set(new.special.values()) - learned
    return Extended(
        tokenizer,
        frozenset(vocabulary[text] for text in vocabulary.keys() - before.keys()),
        frozenset(vocabulary[text] for text in learned | pad | set(new.renamed.values())),
        frozenset(vocabulary[text] for text in pad),
        tuple(text for text in new.plain if text in before),
    )


def _renamed(tokenizer: Any, renamed: Mapping[int, str]) -> Any:
    """The tokenizer with other texts for some tokens, which only its files can be given."""
    key = "added_tokens_overrides"
    added, vocabulary = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    for number, text in renamed.items():
        if number not in added:
            reserved = sorted(added)
            raise UserError(
                f"{key}: {number} is no added token of this tokenizer; expected one of its "
                f"{len(reserved)}: {', '.join(map(str, reserved[:8]))}"
                f"{', ...' if len(reserved) > 8 else ''}."
            )
        if vocabulary.get(text, number) != number:
            raise UserError(
                f"{key}: {text} is token {vocabulary[text]} already, so {number} cannot have that "
                "text; choose another."
            )
    texts = {str(added[number].content): text for number, text in renamed.items()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in (Path(folder) / name for name in _WRITTEN):
            if path.is_file():
                content = _replaced(json.loads(path.read_text(encoding="utf-8")), texts)
                path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        again = type(tokenizer).from_pretrained(folder)
    again.name_or_path = tokenizer.name_or_path
    assert all(again.convert_tokens_to_ids(text) == number for number, text in renamed.items())
    return again


def _replaced(content: Any, texts: Mapping[str, str]) -> Any:
    """`content` with every string, and key, that is one of `texts` replaced."""
    if isinstance(content, dict):
        return {texts.get(key, key): _replaced(value, texts) for key, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, texts) for value in content]
    return texts.get(content, content) if isinstance(content, str) else content
