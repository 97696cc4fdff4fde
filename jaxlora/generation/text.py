"""Between token ids and text: what ends an answer, its text, and its text as it grows."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from jaxlora.data.template import ChatTemplate

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what half a UTF-8 character decodes to


def end_ids(
    tokenizer: Any, template: ChatTemplate | None = None, more: Collection[int] = ()
) -> tuple[int, ...]:
    """Returns the ids that end an answer: the tokenizer's end token, its template's, and `more`.

    Args:
      tokenizer: of transformers.
      template: one whose turns end with tokens of their own (``<|eot_id|>``), if they are single
        tokens of the tokenizer.
      more: such as ``eos_token_id`` of the model's generation_config.json.
    """
    found = {int(number) for number in more}
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if template is not None:
        added = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items()}
        written = [end for end in template.ends if end in template.text]
        found |= {added[end] for end in written if end in added}
    return tuple(sorted(found))


def answer_text(
    tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], *, special: bool = False
) -> str:
    """Returns the text that `answer` adds to the text of `prompt`, a leading space included.

    Args:
      special: whether special tokens are written as their text.
    """
    # Decoded together: a tokenizer may drop a space at the start of a text, or spread a character
    # over several tokens.
    before = _decode(tokenizer, prompt, special)
    whole = _decode(tokenizer, [*prompt, *answer], special)
    if whole.startswith(before):
        return whole.removeprefix(before)
    return _decode(tokenizer, answer, special)


def pieces(tokenizer: Any, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Yields the text of `ids` as it grows, never half a character; joined, it is all the text.

    Special tokens are left out. Several ids may make one piece, and one id may make none.
    """
    known, new = list(prompt), []
    before, text = _decode(tokenizer, known), ""
    for token in ids:
        new.append(token)
        text = _decode(tokenizer, known + new)[len(before) :]
        if text and not text.endswith(_INCOMPLETE):
            yield text
            # A piece starts and ends between characters, so the last one is context enough.
            known, new, text = new, [], ""
            before = _decode(tokenizer, known)
    if text:
        yield text


def _decode(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
