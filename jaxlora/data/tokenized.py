"""Rows that are tokens already: input_ids, labels and attention_mask."""

from collections.abc import Mapping
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.data.encode import Tokens
from jaxlora.data.prompts import no_column
from jaxlora.data.spec import TOKENIZED

# The label of a token that is not trained, as in PyTorch's cross-entropy.
IGNORED = -100


def tokenized(row: Mapping[str, Any], origin: str, *, vocabulary: int) -> Tokens:
    """One row as it is, neither BOS nor EOS added; padding (attention_mask 0) is left out.

    A label belongs to the token at its own place, as in transformers: -100, or the token itself.

    Args:
        row: lists of the same length; attention_mask may be missing.
        origin: of the row, for errors.
        vocabulary: token ids must be below it.

    Raises:
        UserError: a column is missing or no list of whole numbers, the lengths differ, an id is
            out of range, or a label is neither -100 nor the token.

    >>> tokenized({"input_ids": [5, 6], "labels": [-100, 6]}, "f:1", vocabulary=8)
    Tokens(ids=(5, 6), trained=(False, True))
    """
    ids, labels = _numbers(row, "input_ids", origin), _numbers(row, "labels", origin)
    mask = _numbers(row, "attention_mask", origin) if "attention_mask" in row else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise UserError(
            f"{origin}: input_ids, labels and attention_mask have {len(ids)}, {len(labels)} and "
            f"{len(mask)} entries; expected the same number."
        )
    for at, (token, label, real) in enumerate(zip(ids, labels, mask, strict=True)):
        where = f"{origin}: entry {at + 1}"
        if real not in (0, 1):
            raise UserError(f"{where} of attention_mask is {real}; expected 0 or 1.")
        if not 0 <= token < vocabulary:
            raise UserError(
                f"{where} of input_ids is {token}; the tokenizer has {vocabulary} tokens: use the "
                "one that made the data."
            )
        if label not in (IGNORED, token):
            raise UserError(
                f"{where} of labels is {label}; expected {IGNORED} (not trained) or the token "
                f"at the same place, {token}."
            )
    shown = [at for at, real in enumerate(mask) if real]
    if shown and len(shown) != shown[-1] - shown[0] + 1:
        raise UserError(f"{origin}: attention_mask has a gap; expected zeros at the ends only.")
    return Tokens(tuple(ids[at] for at in shown), tuple(labels[at] != IGNORED for at in shown))


def _numbers(row: Mapping[str, Any], column: str, origin: str) -> list[int]:
    if column not in row:
        hint = "; set type, unless the rows are tokens already" if column == "input_ids" else ""
        text = no_column(row, column, origin, TOKENIZED, "a list of whole numbers")
        raise UserError(f"{text.removesuffix('.')}{hint}.")
    value = row[column]
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        raise UserError(
            f'{origin}: the column "{column}" is {str(value)[:40]}; expected a list of whole '
            "numbers."
        )
    return value
