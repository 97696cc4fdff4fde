"""Texts with a label: rows of type `classification` to token ids, a label and token types."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.account import drafted
from jaxlora.data.encode import LabelledExample, too_long
from jaxlora.data.prompts import no_column, text_of
from jaxlora.data.report import EMPTY, TOO_LONG, TOO_SHORT, TRUNCATED
from jaxlora.data.sources import rows, scan
from jaxlora.data.spec import DataOptions, DatasetSpec, Labels
from jaxlora.data.tokenizer import Encoder

_CHUNK = 1000
_SHOWN = 20


def labels_of(specs: Sequence[DatasetSpec], count: int, names: Sequence[str] = ()) -> Labels:
    """Returns the labels of a run.

    Args:
      specs: the training data; read where labels are texts and `names` does not list them.
      count: how many labels there are.
      names: what they are called, in their order.

    Raises:
      UserError: the names are not `count`, or one is there twice.
    """
    found = tuple(names) or _collected(specs)
    if len(set(found)) < len(found):
        raise UserError(f"label_names: {', '.join(found)}: a name is there twice; list each once.")
    if found and len(found) != count:
        source = "label_names lists" if names else "the training data has"
        others = f", or list all {count} in label_names" if len(found) < count else ""
        raise UserError(
            f"num_labels: {count}, but {source} {len(found)} ({_listed(found)}); set num_labels: "
            f"{len(found)}{others}."
        )
    return Labels(count, found)


def _collected(specs: Sequence[DatasetSpec]) -> tuple[str, ...]:
    """The texts in the label columns, sorted; none where labels are numbers."""
    found: set[str] = set()
    for spec in specs:
        for origin, row in rows(spec):
            value = row.get(spec.field_label)
            if isinstance(value, int):
                if named := sorted(text for text in found if not _is_number(text)):
                    raise UserError(
                        f'{origin}: the label in "{spec.field_label}" is {value!r}, and rows '
                        f"before it have names ({_listed(named)}); write names or numbers in all, "
                        "or list the names in label_names."
                    )
                return ()
            if isinstance(value, str):
                found.add(value)
    return () if all(map(_is_number, found)) else tuple(sorted(found))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def label_of(row: Mapping[str, Any], column: str, origin: str, labels: Labels) -> int:
    """Returns the number of a row's label.

    Raises:
      UserError: no label, or one that is not among `labels`.

    >>> label_of({"label": "spam"}, "label", "a.jsonl:1", Labels(2, ("ham", "spam")))
    1
    """
    if column not in row:
        raise UserError(no_column(row, column, origin, "classification", "a label"))
    value, names = row[column], labels.names
    wanted = f"0 to {labels.count - 1}"
    if names:
        wanted = f"{_listed(names)} or {wanted}"
    if isinstance(value, str) and value in names:
        return names.index(value)
    numbered = not any(map(_is_number, names))  # else "1" would be a name that is not there
    if isinstance(value, str) and _is_number(value) and numbered:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < labels.count:
        return value
    near = did_you_mean(value, names) if isinstance(value, str) else ""
    raise UserError(
        f'{origin}: the label in "{column}" is {value!r}; expected {wanted} (num_labels: '
        f"{labels.count}).{near}"
    )


def labelled_examples(
    spec: DatasetSpec, options: DataOptions, encoder: Encoder
) -> Iterator[tuple[str, list[LabelledExample], str | None]]:
    """Yields ``(origin, examples, what happened to the row or None)`` for each row.

    A text becomes what ``tokenizer(text)`` makes of it, so that a model reads it alike wherever it
    is loaded; two texts what ``tokenizer(first, second)`` does.
    """
    labels, limit = options.labels, options.sequence_len
    assert labels is not None, "a data set of this type comes with labels"
    columns = [spec.field or "text", *([spec.field_pair] if spec.field_pair else [])]
    source, cuts = scan(spec), options.excess_length_strategy == "truncate"

    def draft(row: Mapping[str, Any], origin: str) -> tuple[tuple[str, ...], int]:
        texts = tuple(text_of(row, column, origin, "classification") for column in columns)
        return texts, label_of(row, spec.field_label, origin, labels)

    while chunk := list(islice(source, _CHUNK)):
        drafts = [drafted(draft, row, origin, options) for origin, row in chunk]
        texts = [each[0] for each in drafts if not isinstance(each, str)]
        encodings = iter(encoder.whole(texts, limit if cuts else None) if texts else [])
        for (origin, _), made in zip(chunk, drafts, strict=True):
            if isinstance(made, str):
                yield origin, [], made
                continue
            (text, label), encoding = made, next(encodings)
            tokens = np.array(encoding.ids, np.int32)
            if not any(each.strip() for each in text) or not len(tokens):
                yield origin, [], EMPTY
            elif len(tokens) < options.min_sample_len:
                yield origin, [], TOO_SHORT
            elif len(tokens) > limit:
                if options.excess_length_strategy == "raise":
                    raise too_long(origin, len(tokens), limit)
                yield origin, [], TOO_LONG
            else:
                why = TRUNCATED if encoding.overflowing else None
                example = (tokens, np.zeros(len(tokens), np.uint8), (label, _second(encoding)))
                yield origin, [example], why


def _second(encoding: Any) -> int:
    """Where the tokens of type 1 start; they are the last ones."""
    types = encoding.type_ids
    return types.index(1) if 1 in types else len(types)
