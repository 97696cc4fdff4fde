"""Drafts (text with what to train on) to token ids and a trained mask, many at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlora.core.errors import UserError
from jaxlora.data.tokenizer import Encoder

Example = tuple[NDArray[np.int32], NDArray[np.uint8]]
# With the number of its label, and where its second text starts.
LabelledExample = tuple[NDArray[np.int32], NDArray[np.uint8], tuple[int, int]]


@dataclass(frozen=True)
class Pieces:
    """Texts encoded one by one and joined: ``((text, trained), ...)``.

    bos: start with what the tokenizer writes before a text. eos: how many trained end tokens end
    it. literal: the text of a special token stays text. split: may be cut into several examples.
    contents: if given, the first piece holds special tokens, but these character spans of it are
    text.
    """

    pieces: tuple[tuple[str, bool], ...]
    bos: bool
    eos: int
    literal: bool = True
    split: bool = False
    contents: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Rendered:
    """One text encoded whole, with the character spans to train on.

    literal: character spans where the text of a special token stays text. eos: append a trained
    end token that the text lacks. ends: train on every end token outside `literal`.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    literal: tuple[tuple[int, int], ...] = ()
    eos: bool = False
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Token ids with what to train on, as they were in the row."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


Draftable = Pieces | Rendered | Tokens


def encode(drafts: Sequence[Draftable], encoder: Encoder) -> list[Example]:
    """Encodes drafts of all kinds, in order; the first token is never trained."""
    done: dict[int, Example] = {
        i: (np.array(draft.ids, np.int32), np.array(draft.trained, np.uint8))
        for i, draft in enumerate(drafts)
        if isinstance(draft, Tokens)
    }
    done |= _encode_pieces({i: d for i, d in enumerate(drafts) if isinstance(d, Pieces)}, encoder)
    done |= _encode_rendered(
        {i: d for i, d in enumerate(drafts) if isinstance(d, Rendered)}, encoder
    )
    for _, trained in done.values():
        # Nothing comes before the first token, so it can never be predicted.
        trained[:1] = 0
    return [done[i] for i in range(len(drafts))]


def _encode_pieces(drafts: dict[int, Pieces], encoder: Encoder) -> dict[int, Example]:
    done: dict[int, Example] = {}
    framed = _encode_framed({i: d for i, d in drafts.items() if d.contents is not None}, encoder)
    for literal in (True, False):
        chosen = {i: draft for i, draft in drafts.items() if draft.literal is literal}
        texts = [text for i, d in chosen.items() for text, _ in d.pieces[i in framed :]]
        ids = iter(encoder.ids(texts, literal=literal) if texts else [])
        for i, draft in chosen.items():
            tokens = list(encoder.prefix) if draft.bos else []
            counts = [(len(tokens), False)]
            for number, (_, trained) in enumerate(draft.pieces):
                piece = framed[i] if number == 0 and i in framed else next(ids)
                tokens += piece
                counts.append((len(piece), trained))
            if draft.eos:
                tokens += [encoder.eos_id] * draft.eos
                counts.append((int(draft.eos), True))
            lengths, flags = zip(*counts, strict=True)
            done[i] = (
                np.array(tokens, np.int32),
                np.repeat(np.array(flags, np.uint8), lengths),
            )
    return done


def _encode_framed(drafts: dict[int, Pieces], encoder: Encoder) -> dict[int, list[int]]:
    """Token ids of the first piece of each draft, special but in its `contents`."""
    texts = [draft.pieces[0][0] for draft in drafts.values()]
    encodings = encoder.with_offsets(texts) if texts else []
    found = {}
    for (i, draft), text, encoding in zip(drafts.items(), texts, encodings, strict=True):
        tokens = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        assert draft.contents is not None
        rendered = Rendered(text, (), draft.contents)
        found[i] = _literal(tokens, offsets, rendered, encoder)[0].tolist()
    return found


def _encode_rendered(drafts: dict[int, Rendered], encoder: Encoder) -> dict[int, Example]:
    encodings = encoder.with_offsets([draft.text for draft in drafts.values()]) if drafts else []
    done = {}
    for (i, draft), encoding in zip(drafts.items(), encodings, strict=True):
        tokens = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        if draft.literal:
            tokens, offsets = _literal(tokens, offsets, draft, encoder)
        trained = _overlap(offsets, draft.spans)
        if draft.ends:
            ends = {encoder.tokenizer.convert_tokens_to_ids(text) for text in draft.ends}
            outside = ~_overlap(offsets, draft.literal).astype(bool)
            trained |= (np.isin(tokens, list(ends)) & outside).astype(np.uint8)
        if draft.eos:
            tokens = np.append(tokens, np.int32(encoder.eos_id))
            trained = np.append(trained, np.uint8(1))
        done[i] = (tokens, trained)
    return done


def _overlap(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """1 for each token that shares a character with a span.

    A token that straddles the start (a space joined to the first word) belongs to the span: the
    model must produce it to start the answer.
    """
    marked = np.zeros(len(offsets), bool)
    for start, stop in spans:
        marked |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    # A token without characters (a dummy prefix) overlaps nothing.
    return (marked & (offsets[:, 0] < offsets[:, 1])).astype(np.uint8)


def _literal(
    tokens: NDArray[np.int32], offsets: NDArray[np.int64], draft: Rendered, encoder: Encoder
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Replaces special tokens that lie in `literal` by the tokens of their text."""
    inside = _overlap(offsets, draft.literal).astype(bool)
    false = inside & np.isin(tokens, list(encoder.special_ids))
    parts_ids: list[NDArray] = []
    parts_offsets: list[NDArray] = []
    last = 0
    for at in np.flatnonzero(false).tolist():
        start, stop = offsets[at].tolist()
        ids = encoder.literal_ids(draft.text[start:stop])
        parts_ids += [tokens[last:at], np.array(ids, np.int32)]
        span = np.tile(np.array([[start, stop]]), (len(ids), 1))
        parts_offsets += [offsets[last:at], span]
        last = at + 1
    return (
        np.concatenate([*parts_ids, tokens[last:]]).astype(np.int32),
        np.concatenate([*parts_offsets, offsets[last:]]),
    )


def too_long(origin: str, length: int, limit: int) -> UserError:
    """The error of a row beyond `sequence_len`, where that is one."""
    return UserError(
        f"{origin}: has {length} tokens, more than sequence_len {limit}; raise sequence_len or "
        "set excess_length_strategy to drop or truncate."
    )


def cut(example: Example, length: int) -> list[Example]:
    """Splits an example into pieces of at most `length` tokens.

    Each piece starts with the last token of the one before, so that every token but the first of
    the text is a target exactly once.
    """
    tokens, trained = example
    pieces = []
    for start in range(0, max(1, len(tokens) - 1), length - 1):
        part = trained[start : start + length].copy()
        part[:1] = 0
        pieces.append((tokens[start : start + length], part))
    return pieces
