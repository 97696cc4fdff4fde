"""Rows with a conversation to drafts, by the chat template; only the trained roles' turns count."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.encode import Rendered
from jaxlora.data.prompts import check_text
from jaxlora.data.spec import DEFAULT_ROLES, DatasetSpec
from jaxlora.data.template import ChatTemplate, Message, TemplateError, Turn, texts_in
from jaxlora.data.tokenizer import Encoder, template_text

UNSAFE = "holds a special token as text in a turn that the chat template rewrites"


@dataclass(frozen=True)
class Dropped:
    """A row that is left out and counted under its reason."""

    reason: str


def template_of(
    tokenizer: Any, choice: str | None = None, eot_tokens: Sequence[str] = ()
) -> ChatTemplate:
    """The chat template of a choice, with the tokenizer's special tokens.

    Raises:
        UserError: see `tokenizer.template_text`.
    """
    variables = {name: text for name, text in tokenizer.special_tokens_map.items() if text}
    return ChatTemplate(template_text(tokenizer, choice), variables, tuple(eot_tokens))


def prompt_ids(
    messages: Sequence[Message], encoder: Encoder, template: ChatTemplate, tools: Any = None
) -> list[int]:
    """Token ids of a conversation up to where the next answer starts, as in training.

    Raises:
        UserError: the template refuses the conversation.
    """
    try:
        text = template.render(messages, add_generation_prompt=True, tools=tools)
    except TemplateError as error:
        raise UserError(f"chat: {error}.") from error
    return list(encoder.with_offsets([text])[0].ids)


def chat(
    row: Mapping[str, Any],
    origin: str,
    spec: DatasetSpec,
    template: ChatTemplate,
    encoder: Encoder,
    *,
    train_on_inputs: bool = False,
) -> Rendered | Dropped:
    """One conversation.

    Raises:
        UserError: the row is no conversation, or the template refuses it.
    """
    messages = conversation(row, origin, spec)
    tools = _tools(row, origin)
    trained = [i for i, message in enumerate(messages) if message["role"] in spec.roles_to_train]
    try:
        text, turns = template.turns(messages, trained, tools)
        literal = ()
        if any(encoder.has_special(text) for message in messages for text in texts_in(message)):
            places = template.contents(text, messages, tools)
            if places is None:
                return Dropped(UNSAFE)
            literal = tuple((start, stop) for _, start, stop in places)
    except TemplateError as error:
        raise UserError(f"{origin}: {error}.") from error
    last = bool(turns) and trained[-1] == len(messages) - 1
    return _draft(text, turns, last, literal, spec, template, encoder, train_on_inputs)


def _draft(
    text: str,
    turns: list[Turn],
    ends_with_answer: bool,
    literal: tuple[tuple[int, int], ...],
    spec: DatasetSpec,
    template: ChatTemplate,
    encoder: Encoder,
    train_on_inputs: bool,
) -> Rendered:
    eos = False
    if ends_with_answer and spec.train_on_eos != "none":
        final = turns[-1]
        # A template that writes no end token after the last answer would teach to go on forever.
        if final.end == final.stop and not text[final.stop :].strip():
            text, eos = text[: final.stop], True
    learned = {
        "turn": [True] * len(turns),
        "all": [True] * len(turns),
        "last": [i == len(turns) - 1 for i in range(len(turns))],
        "none": [False] * len(turns),
    }[spec.train_on_eos]
    spans = tuple(
        (turn.start, turn.stop if with_end else turn.end)
        for turn, with_end in zip(turns, learned, strict=True)
    )
    if train_on_inputs:
        spans = ((0, len(text)),)
    ends: tuple[str, ...] = ()
    if spec.train_on_eos == "all" and turns:
        ends = tuple(t for t in template.ends if t in encoder.special_texts)
    return Rendered(text, spans, literal, eos, ends)


def conversation(row: Mapping[str, Any], origin: str, spec: DatasetSpec) -> list[Message]:
    """The messages of a row with our names for roles and properties.

    Raises:
        UserError: a message lacks its role or its content, or they are of another type.
    """
    found = row.get(spec.field_messages)
    if spec.field_messages not in row:
        raise UserError(
            f'{origin}: the type chat_template needs the column "{spec.field_messages}"; columns '
            f"found: {', '.join(map(str, row)) or 'none'} (set field_messages)."
            f"{did_you_mean(spec.field_messages, map(str, row))}"
        )
    if not isinstance(found, list) or not found:
        raise UserError(
            f'{origin}: the column "{spec.field_messages}" must be a list of messages with at '
            f"least one, got {'an empty list' if found == [] else type(found).__name__}."
        )
    names = {"role": "role", "content": "content", **(spec.message_property_mappings or {})}
    words = {
        word: role
        for role, all_words in (spec.roles or DEFAULT_ROLES).items()
        for word in all_words
    }
    messages = [
        _message(message, f"{origin}: message {number}", names, words)
        for number, message in enumerate(found, 1)
    ]
    if spec.drop_system_message and messages[0]["role"] == "system":
        return messages[1:] or messages
    return messages


def _message(given: Any, where: str, names: Mapping[str, str], words: Mapping[str, str]) -> Message:
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be an object with a role and a content, got {given!r:.40}.")
    message = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    taken = set(names.values())
    # Parquet fills the keys that a message lacks with null.
    message |= {k: v for k, v in given.items() if k not in taken and v is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UserError(
            f'{where} has no "{names["role"]}"; keys found: {", ".join(map(str, given))} '
            "(set message_property_mappings)."
        )
    if "content" not in message and not message.get("tool_calls"):
        raise UserError(
            f'{where} has no "{names["content"]}"; keys found: {", ".join(map(str, given))} '
            "(set message_property_mappings)."
        )
    if content is None and message.get("tool_calls"):
        message["content"] = ""
    elif not isinstance(content, str | list):
        kind = "null" if content is None else type(content).__name__
        raise UserError(f'{where}: "{names["content"]}" is {kind}; expected text.')
    for text in texts_in(message):
        check_text(text, where)
    return {**message, "role": words.get(role, role)}


def _tools(row: Mapping[str, Any], origin: str) -> Any:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f'{origin}: the column "tools" is not valid JSON: {error}.') from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f'{origin}: the column "tools" must be a list of objects.')
    return tools
