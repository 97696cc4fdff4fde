"""Rows with prompt and answer columns to drafts: alpaca, completion, input_output, custom."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.encode import Pieces

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, input: str | None = None) -> str:
    """The Stanford Alpaca prompt, up to where the answer starts.

    >>> alpaca_prompt("Say hi.").endswith("### Response:\\n")
    True
    """
    form = _WITH_INPUT if input else _WITHOUT_INPUT
    return form.format(instruction=instruction, input=input)


def alpaca(row: Mapping[str, Any], origin: str, *, train_on_inputs: bool = False) -> Pieces:
    """Columns instruction, output and (optional) input."""
    instruction = text_of(row, "instruction", origin, "alpaca")
    output = text_of(row, "output", origin, "alpaca")
    context = text_of(row, "input", origin, "alpaca") if row.get("input") is not None else ""
    return _answered(alpaca_prompt(instruction, context), output, train_on_inputs)


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
        raise UserError(_no_column(row, "segments", origin, "input_output", "a list of segments"))
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
            custom.prompt("", "", "")
            custom.prompt("", "x", "x")
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"datasets: type: a format may use {{instruction}}, {{input}} and (system_format) "
                f"{{system}} only: {error}."
            ) from error
        return custom

    def prompt(self, instruction: str, input: str, system: str) -> str:
        """The text before the answer."""
        no_input = self.no_input_format if self.no_input_format is not None else self.format
        turn = (self.format if input else no_input).format(instruction=instruction, input=input)
        return (self.system_format.format(system=system) if system else "") + turn

    def draft(self, row: Mapping[str, Any], origin: str, *, train_on_inputs: bool) -> Pieces:
        """One row as a prompt and a trained answer."""

        def optional(name: str | None) -> str:
            present = name is not None and row.get(name) is not None
            return text_of(row, name, origin, "custom") if present and name else ""

        prompt = self.prompt(
            text_of(row, self.field_instruction, origin, "custom"),
            optional(self.field_input),
            optional(self.field_system) or self.system_prompt,
        )
        return _answered(prompt, text_of(row, self.field_output, origin, "custom"), train_on_inputs)


def text_of(row: Mapping[str, Any], column: str, origin: str, kind: str) -> str:
    """The text in a column.

    Raises:
        UserError: the column is missing, null, not text, or not encodable.
    """
    if column not in row:
        raise UserError(_no_column(row, column, origin, kind, "text"))
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


def _no_column(row: Mapping[str, Any], column: str, origin: str, kind: str, expected: str) -> str:
    found = ", ".join(map(str, row)) or "none"
    return (
        f'{origin}: the type {kind} needs the column "{column}" ({expected}); columns found: '
        f"{found}.{did_you_mean(column, map(str, row))}"
    )


def _answered(prompt: str, answer: str, train_on_inputs: bool) -> Pieces:
    # Encoded apart, as Axolotl does and as generation sees it: the prompt's tokens never depend
    # on the answer.
    return Pieces(((prompt, train_on_inputs), (answer, True)), bos=True, eos=True)
