"""Rows with prompt and answer columns to drafts: forms with slots, completion, input_output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from string import Formatter
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.encode import Pieces
from jaxlora.data.tokenizer import Encoder

Read = Callable[[Any, str], str]


@dataclass(frozen=True)
class Column:
    """Where the text of a slot comes from.

    names: the first one that a row has. default: without it, where `missing` allows that, or where
    it is null and `null` allows that. read: writes a value that is not text as text; its second
    argument says where the value is.
    """

    names: tuple[str, ...]
    missing: bool = False
    null: bool = False
    default: str = ""
    read: Read | None = None

    def text(self, row: Mapping[str, Any], origin: str, kind: str) -> str:
        """The text of a row.

        Raises:
            UserError: the column is missing or null and must not be, or holds something else.
        """
        name = next((each for each in self.names if each in row), None)
        if name is None:
            return self.default if self.missing else text_of(row, self.names[0], origin, kind)
        if row[name] is None and self.null:
            return self.default
        if self.read is None:
            return text_of(row, name, origin, kind)
        written = self.read(row[name], f'{origin}: the column "{name}"')
        check_text(written, f'{origin}: the column "{name}"')
        return written


@dataclass(frozen=True)
class Instruction:
    """A prompt and its answer as forms, whose ``{slots}`` are filled from the columns of a row.

    with_input: the prompt where a slot that only it has is not empty; else without_input. system:
    comes before both where one of its slots is not empty. columns: of slots that are not simply a
    column of that name. ends: trained end tokens after the answer.

    >>> form = Instruction("Q: {question} ({hint}) A:", "Q: {question} A:", "{answer}")
    >>> form.draft({"question": "1+1?", "answer": "2"}, "f:1", "sums").pieces
    (('Q: 1+1? A:', False), ('2', True))
    """

    with_input: str
    without_input: str
    answer: str
    system: str = ""
    columns: Mapping[str, Column] = field(default_factory=dict)
    ends: int = 1

    def draft(
        self,
        row: Mapping[str, Any],
        origin: str,
        kind: str,
        *,
        train_on_inputs: bool = False,
        framed: bool = False,
    ) -> Pieces:
        """One row as a prompt and a trained answer.

        `framed`: the forms hold special tokens (see `holds_special`); what the row fills in still
        stays text.

        Raises:
            UserError: a column is missing or holds no text.
        """
        texts = {slot: column.text(row, origin, kind) for slot, column in self._column_of.items()}
        form = self.with_input if any(texts[slot] for slot in self._inputs) else self.without_input
        if any(texts[slot] for slot in _slots(self.system)):
            form = self.system + form
        prompt, contents = _filled(form, texts)
        answer, _ = _filled(self.answer, texts)
        # Encoded apart, as Axolotl does and as generation sees it: the prompt's tokens never
        # depend on the answer.
        pieces = ((prompt, train_on_inputs), (answer, True))
        return Pieces(pieces, bos=True, eos=self.ends, contents=contents if framed else None)

    def holds_special(self, encoder: Encoder) -> bool:
        """Whether a form of the prompt holds the text of a special token."""
        return any(map(encoder.has_special, (self.with_input, self.without_input, self.system)))

    @cached_property
    def _inputs(self) -> tuple[str, ...]:
        return tuple(each for each in _slots(self.with_input) if each not in self._always)

    @cached_property
    def _always(self) -> tuple[str, ...]:
        return _slots(self.without_input)

    @cached_property
    def _column_of(self) -> dict[str, Column]:
        found = {slot: Column((slot,)) for slot in (*self._always, *_slots(self.answer))}
        found |= {slot: Column((slot,), null=True) for slot in _slots(self.system)}
        found |= {slot: Column((slot,), missing=True, null=True) for slot in self._inputs}
        return found | {slot: self.columns[slot] for slot in found if slot in self.columns}


@cache
def _parsed(form: str) -> tuple[tuple[str, str | None], ...]:
    """The text before each slot with the slot's name; None after the last."""
    parts = []
    for text, name, spec, conversion in Formatter().parse(form):
        if spec or conversion or name == "":
            raise ValueError(f"{{{name}}} must be a name alone")
        parts.append((text, name))
    return tuple(parts)


def _slots(form: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name in _parsed(form) if name is not None))


def _filled(form: str, texts: Mapping[str, str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The form with its slots filled, and where in it (characters) what was filled in is."""
    written, spans, at = [], [], 0
    for before, slot in _parsed(form):
        text = texts[slot] if slot is not None else ""
        written += [before, text]
        at += len(before)
        if text:
            spans.append((at, at + len(text)))
        at += len(text)
    return "".join(written), tuple(spans)


def completion(row: Mapping[str, Any], origin: str, *, field: str | None = None) -> Pieces:
    """One text column, all of it trained; a text longer than a row is split, not dropped."""
    text = text_of(row, field or "text", origin, "completion")
    return Pieces(((text, True),), bos=True, eos=True, split=True)


def input_output(row: Mapping[str, Any], origin: str, *, train_on_inputs: bool = False) -> Pieces:
    """``segments: [{"text": ..., "label": true|false}]``: the author writes every token.

    Nothing is added, neither BOS nor EOS, and special tokens in the text are special, as in
    Axolotl: the file is the template.
    """
    segments = row.get("segments")
    if not isinstance(segments, list) or not segments:
        raise UserError(no_column(row, "segments", origin, "input_output", "a list of segments"))
    pieces = []
    for number, segment in enumerate(segments, 1):
        where = f"{origin}: segment {number}"
        if not isinstance(segment, Mapping):
            raise UserError(f'{where}: expected {{"text": ..., "label": true|false}}.')
        if not isinstance(segment.get("label"), bool):
            raise UserError(f"{where}: label must be true or false, got {segment.get('label')!r}.")
        text = text_of(segment, "text", where, "input_output")
        pieces.append((text, segment["label"] or train_on_inputs))
    return Pieces(tuple(pieces), bos=False, eos=False, literal=False)


@dataclass(frozen=True)
class CustomPrompt:
    """The mapping form of `type:`; `format` may use {instruction}, {input} and {output}'s prompt.

    >>> CustomPrompt(field_instruction="mr", field_output="ref", format="{instruction}\\n").format
    '{instruction}\\n'
    """

    field_instruction: str = "instruction"
    field_output: str = "output"
    field_input: str | None = None
    field_system: str | None = None
    system_prompt: str = ""
    system_format: str = "{system}"
    format: str = "{instruction} {input}"
    no_input_format: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "CustomPrompt":
        """Checks the keys of the mapping.

        Raises:
            UserError: a key is not known, or a format names another field.
        """
        known = [each.name for each in fields(cls)]
        for key in given:
            if key not in known:
                raise UserError(
                    f'datasets: type: the key "{key}" is not known.{did_you_mean(key, known)}'
                )
        custom = cls(**{key: value for key, value in given.items() if value is not None})
        try:
            named = {*_slots(custom.format), *_slots(custom.no_input_format or "")}
            wrong = {*named} - {"instruction", "input"} | {*_slots(custom.system_format)} - {
                "system"
            }
        except ValueError as error:
            raise UserError(f"datasets: type: a format cannot be read: {error}.") from error
        if wrong:
            raise UserError(
                f"datasets: type: a format may use {{instruction}}, {{input}} and (system_format) "
                f"{{system}} only, not {', '.join(f'{{{name}}}' for name in sorted(wrong))}."
            )
        return custom

    @cached_property
    def instruction(self) -> Instruction:
        """The forms and columns."""

        def optional(name: str | None, default: str = "") -> Column:
            names = () if name is None else (name,)
            return Column(names, missing=True, null=True, default=default)

        columns = {
            "instruction": Column((self.field_instruction,)),
            "output": Column((self.field_output,)),
            "input": optional(self.field_input),
            "system": optional(self.field_system, self.system_prompt),
        }
        without = self.no_input_format if self.no_input_format is not None else self.format
        return Instruction(self.format, without, "{output}", self.system_format, columns)


def text_of(row: Mapping[str, Any], column: str, origin: str, kind: str) -> str:
    """The text in a column.

    Raises:
        UserError: the column is missing, null, not text, or not encodable.
    """
    if column not in row:
        raise UserError(no_column(row, column, origin, kind, "text"))
    value = row[column]
    if value is None:
        raise UserError(f'{origin}: the column "{column}" is null; expected text.')
    if not isinstance(value, str):
        raise UserError(
            f'{origin}: the column "{column}" is {type(value).__name__} ({str(value)[:40]}); '
            "expected text."
        )
    check_text(value, f'{origin}: the column "{column}"')
    return value


def check_text(value: str, where: str) -> None:
    """Checks that a text is valid Unicode (JSON escapes can spell half a surrogate pair)."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a surrogate pair at character {error.start + 1}; "
            "write the character itself."
        ) from error


def no_column(row: Mapping[str, Any], column: str, origin: str, kind: str, expected: str) -> str:
    """The message of a row that lacks a column its data set's type needs."""
    found = ", ".join(map(str, row)) or "none"
    return (
        f'{origin}: the type {kind} needs the column "{column}" ({expected}); columns found: '
        f"{found}.{did_you_mean(column, map(str, row))}"
    )
