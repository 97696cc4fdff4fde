"""Prompts with their expected answers, for scoring what a model generates."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from jaxlora.data.encode import Example
from jaxlora.data.prepare import examples_of
from jaxlora.data.spec import DataOptions, DatasetSpec
from jaxlora.data.table import TokenTable, decode
from jaxlora.data.template import KNOWN_ENDS
from jaxlora.data.tokenizer import Encoder


def examples_for_scoring(
    spec: DatasetSpec, options: DataOptions, tokenizer: Any, limit: int | None = None
) -> list[tuple[list[int], str]]:
    """``(prompt token ids, expected text)`` of the first `limit` rows of a data set.

    The prompt ends where the last answer starts. The expected text lacks the end token and the
    white space around it (a tokenizer may join a space to the first word): strip what is compared.
    """
    masked = dataclasses.replace(options, train_on_inputs=False)
    encoder = Encoder(tokenizer)
    found = (each for _, all_, _ in examples_of(spec, masked, encoder) for each in all_)
    return [_scored(each, encoder, options.eot_tokens) for each in islice(found, limit)]


def table_for_scoring(
    table: TokenTable, tokenizer: Any, limit: int | None = None, eot_tokens: tuple[str, ...] = ()
) -> list[tuple[list[int], str]]:
    """The same from a prepared table (for held-out rows), made without `train_on_inputs`."""
    encoder = Encoder(tokenizer)
    count = len(table) if limit is None else min(limit, len(table))
    return [_scored(each, encoder, eot_tokens) for each in _first(table, count)]


def _first(table: TokenTable, count: int) -> Iterator[Example]:
    for index in range(count):
        yield table[index]


def _scored(
    example: Example, encoder: Encoder, eot_tokens: tuple[str, ...]
) -> tuple[list[int], str]:
    tokens, trained = example
    learned = np.flatnonzero(trained)
    # The last run of trained tokens starts after the last gap.
    gaps = np.flatnonzero(np.diff(learned) > 1)
    start = int(learned[gaps[-1] + 1] if len(gaps) else learned[0])
    stop = int(learned[-1]) + 1
    while stop > start and int(tokens[stop - 1]) in encoder.special_ids:
        stop -= 1
    before = decode(tokens[:start], encoder.tokenizer)
    whole = decode(tokens[:stop], encoder.tokenizer)
    expected = (
        whole.removeprefix(before)
        if whole.startswith(before)
        else decode(tokens[start:stop], encoder.tokenizer)
    )
    for end in (*eot_tokens, *KNOWN_ENDS):
        # A tokenizer that does not know the template's end token writes it as text.
        expected = expected.removesuffix(end)
    return tokens[:start].tolist(), expected.strip()
