"""From data set entries to tokens on disk, with an account of every row."""

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.core.errors import UserError
from jaxlora.data import cache
from jaxlora.data.account import Account, drafted
from jaxlora.data.chat import Dropped, chat, check_ends, template_of
from jaxlora.data.encode import Draftable, Example, Pieces, cut, encode, too_long
from jaxlora.data.held_out import hold_out
from jaxlora.data.identity import key_parts, refuse_changed, stamps
from jaxlora.data.instructions import INSTRUCTIONS
from jaxlora.data.labels import labelled_examples
from jaxlora.data.origins import write_row_numbers
from jaxlora.data.prompts import CustomPrompt, Instruction, completion, input_output
from jaxlora.data.report import (
    DIVIDED,
    DUPLICATE,
    EMPTY,
    NOTHING_TRAINED,
    TOO_LONG,
    TOO_SHORT,
    TRUNCATED,
    Report,
    SourceReport,
    TableReport,
    table_report,
)
from jaxlora.data.sources import scan
from jaxlora.data.spec import TOKENIZED, DataOptions, DatasetSpec
from jaxlora.data.streaming import Enough
from jaxlora.data.table import TableWriter, TokenTable, tables_digest
from jaxlora.data.tokenized import tokenized
from jaxlora.data.tokenizer import Encoder

# Rows encoded at once: enough for every core, little enough to hold.
_CHUNK = 1000

Draft = Draftable | Dropped
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Tables to train on and to evaluate on; `fingerprint` is a digest of what is in them.

    counts: examples of each data set in `train`, one data set after the other.
    """

    train: TokenTable
    evaluation: TokenTable | None
    report: Report
    fingerprint: str
    counts: tuple[int, ...]


def prepare(
    train_specs: Sequence[DatasetSpec],
    test_specs: Sequence[DatasetSpec],
    options: DataOptions,
    tokenizer: Any,
    *,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenizes the data sets into memory-mapped tables, or finds them in the cache.

    `progress(rows, tokens)` is called now and then with totals so far.

    Raises:
        UserError: a row cannot be used (named by file and line), or nothing is left to train on.
    """
    if not train_specs:
        raise UserError("datasets: none is given; expected at least one entry with path and type.")
    if test_specs and options.val_set_size:
        raise UserError("val_set_size and test_datasets exclude each other; keep one.")
    files = stamps([*train_specs, *test_specs])
    parts = key_parts(train_specs, test_specs, options, tokenizer)
    key, given = cache.key_of(parts), options.dataset_prepared_path
    root = Path(given).expanduser() if given else cache.default_folder()
    missed = () if (root / key).exists() else cache.differences(root, parts)

    def build(out: Path) -> dict[str, Any]:
        meta = _build(out, train_specs, test_specs, options, tokenizer, progress)
        refuse_changed([*train_specs, *test_specs], files)
        return meta

    folder, meta, cached = cache.open_or_build(root, key, build, parts)
    evaluation = TokenTable.load(folder / "evaluation") if meta["evaluation"] else None
    report = Report(
        tuple(SourceReport(**each) for each in meta["train_sources"]),
        tuple(SourceReport(**each) for each in meta["test_sources"]),
        TableReport(**meta["train"]),
        TableReport(**meta["evaluation"]) if meta["evaluation"] else None,
        cached,
        str(folder),
        missed,
    )
    table = TokenTable.load(folder / "train")
    return Prepared(table, evaluation, report, meta["digest"], tuple(meta["train_counts"]))


def examples_of(
    spec: DatasetSpec, options: DataOptions, encoder: Encoder
) -> Iterator[tuple[str, list[Example], str | None]]:
    """Yields ``(origin, examples, what happened to the row or None)`` for each row."""
    to_draft = drafter(spec, options, encoder)
    source = scan(spec)
    while chunk := list(islice(source, _CHUNK)):
        drafts = [drafted(to_draft, row, origin, options) for origin, row in chunk]
        usable = [draft for draft in drafts if not isinstance(draft, Dropped | str)]
        encoded = iter(encode(usable, encoder))
        for (origin, _), draft in zip(chunk, drafts, strict=True):
            if isinstance(draft, Dropped | str):
                yield origin, [], draft if isinstance(draft, str) else draft.reason
            else:
                yield origin, *_fit(next(encoded), draft, origin, options)


def drafter(
    spec: DatasetSpec, options: DataOptions, encoder: Encoder
) -> Callable[[Mapping[str, Any], str], Draft]:
    """The function of a data set's type that turns ``(row, origin)`` into a draft."""
    inputs = options.train_on_inputs
    if not isinstance(spec.type, str):
        return _instruction(CustomPrompt.of(spec.type).instruction, "custom", inputs, encoder)
    if spec.type in INSTRUCTIONS:
        return _instruction(INSTRUCTIONS[spec.type], spec.type, inputs, encoder)
    if spec.type == "input_output":
        return partial(input_output, train_on_inputs=inputs)
    if spec.type == "completion":
        return partial(_completion, field=spec.field)
    if spec.type == TOKENIZED:
        return partial(tokenized, vocabulary=len(encoder.tokenizer))
    talk = spec.chat
    assert talk is not None, "every type is one of these"
    template = template_of(
        encoder.tokenizer, talk.chat_template or options.chat_template, options.eot_tokens
    )
    check_ends(talk, template)
    return partial(chat, spec=talk, template=template, encoder=encoder, train_on_inputs=inputs)


def _instruction(
    form: Instruction, kind: str, train_on_inputs: bool, encoder: Encoder
) -> Callable[[Mapping[str, Any], str], Draft]:
    framed = form.holds_special(encoder)
    return partial(form.draft, kind=kind, train_on_inputs=train_on_inputs, framed=framed)


def _completion(row: Mapping[str, Any], origin: str, field: str | None) -> Draft:
    draft = completion(row, origin, field=field)
    return draft if draft.pieces[0][0].strip() else Dropped(EMPTY)


def _fit(
    example: Example, draft: Draftable, origin: str, options: DataOptions
) -> tuple[list[Example], str | None]:
    limit, why = options.sequence_len, None
    if len(example[0]) < options.min_sample_len:
        return [], TOO_SHORT
    examples = [example]
    if len(example[0]) > limit:
        strategy = options.excess_length_strategy
        if (isinstance(draft, Pieces) and draft.split) or strategy == "split":
            examples, why = cut(example, limit), DIVIDED
        elif strategy == "raise":
            raise too_long(origin, len(example[0]), limit)
        elif strategy == "drop":
            return [], TOO_LONG
        else:
            examples, why = [(example[0][:limit], example[1][:limit])], TRUNCATED
    examples = [each for each in examples if each[1].any()]
    return (examples, why) if examples else ([], NOTHING_TRAINED)


def _build(
    out: Path,
    train_specs: Sequence[DatasetSpec],
    test_specs: Sequence[DatasetSpec],
    options: DataOptions,
    tokenizer: Any,
    progress: Progress | None,
) -> dict[str, Any]:
    encoder = Encoder(tokenizer)
    whole = dataclasses.replace(options, stream_examples=None, stream_tokens=None)
    held_out = bool(options.val_set_size)
    seen: set[bytes] | None = set() if options.deduplicate else None
    train_reports, row_of = _write(out / "train", train_specs, options, encoder, progress, seen)
    test_reports: list[SourceReport] = []
    if test_specs:
        test_reports, _ = _write(out / "evaluation", test_specs, whole, encoder, progress, seen)
    counts = [report.examples for report in train_reports]
    rows = np.frombuffer(row_of, np.int64)
    if held_out:
        staying = hold_out(out, rows, options)
        rows = rows[staying]
        starts = np.cumsum([0, *counts[:-1]])
        counts = np.add.reduceat(staying.astype(np.int64), starts).tolist()
    write_row_numbers(out / "train", rows)
    packed = options.sample_packing
    eval_packed = packed if options.eval_sample_packing is None else options.eval_sample_packing
    evaluation = None
    if test_specs or held_out:
        evaluation = table_report(out / "evaluation", options, eval_packed)
    return {
        "digest": tables_digest(out),
        "train_sources": [dataclasses.asdict(each) for each in train_reports],
        "test_sources": [dataclasses.asdict(each) for each in test_reports],
        "train_counts": counts,
        "train": table_report(out / "train", options, packed),
        "evaluation": evaluation,
    }


def _write(
    folder: Path,
    specs: Sequence[DatasetSpec],
    options: DataOptions,
    encoder: Encoder,
    progress: Progress | None,
    seen: set[bytes] | None,
) -> tuple[list[SourceReport], "array[int]"]:
    """Writes one table; returns the reports and the row number of each example.

    `seen` collects the rows so far, to leave out those that come again.
    """
    reports: list[SourceReport] = []
    row_of = array("q")
    tokens = 0
    with TableWriter(folder) as writer:
        for number, spec in enumerate(specs):
            before, account = sum(report.read for report in reports), Account(spec, options)
            enough, first, begun = Enough(options, number), len(writer), tokens
            if number and enough(0, 0, first, tokens):
                reports.append(SourceReport(spec.path, spec.split, 0, 0, {}, 0, 0))
                continue
            classifies = spec.type == "classification"
            read_rows: Any = labelled_examples if classifies else examples_of
            for origin, examples, why in read_rows(spec, options, encoder):
                if seen is not None and examples and _again(examples, seen):
                    examples, why = [], DUPLICATE
                account.add(origin, len(examples), why)
                for example in examples:
                    writer.add(*example)
                    tokens += len(example[0])
                    row_of.append(before + account.read)
                if progress is not None and account.read % _CHUNK == 0:
                    progress(before + account.read, tokens)
                if enough(len(writer) - first, tokens - begun, len(writer), tokens):
                    break
            reports.append(account.close())
    return reports, row_of


def _again(examples: list[Example], seen: set[bytes]) -> bool:
    """Whether a row's tokens are in `seen`; if not, puts them there."""
    parts = (np.asarray(part).tobytes() for example in examples for part in example)
    mark = hashlib.blake2b(b"".join(parts), digest_size=16).digest()
    found = mark in seen
    seen.add(mark)
    return found
