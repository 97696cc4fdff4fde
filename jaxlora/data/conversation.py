"""Rows with a conversation: messages with our names, and which of them are trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.prompts import check_text
from jaxlora.data.spec import DEFAULT_ROLES, DatasetSpec
from jaxlora.data.template import Message, texts_in

# A row's own system prompt, for conversations that start without one.
_SYSTEM = "system"
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
_OFFSETS = ("begin_offset", "end_offset")


@dataclass(frozen=True)
class Mark:
    """What a message says of its own training.

    trained: None leaves it to the role. parts: characters ``[start, stop)`` of the content that are
    trained, where not all of it is.
    """

    trained: bool | None = None
    parts: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages with a mark for each, and the tools they may call."""

    messages: list[Message]
    marks: tuple[Mark, ...]
    tools: list[dict[str, Any]] | None

    def trained(self, roles: Sequence[str] | None) -> list[int]:
        """The messages to train on, where those of `roles` (None: of all) say nothing else."""
        return [
            i
            for i, (message, mark) in enumerate(zip(self.messages, self.marks, strict=True))
            if mark.trained
            or (mark.trained is None and (roles is None or message["role"] in roles))
        ]


def conversation(row: Mapping[str, Any], origin: str, spec: DatasetSpec) -> Conversation:
    """The conversation of a row with our names for roles and properties.

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
    read = [
        _message(message, f"{origin}: message {number}", spec)
        for number, message in enumerate(found, 1)
    ]
    own = row.get(_SYSTEM)
    if isinstance(own, str) and own and read[0][0]["role"] != "system":
        check_text(own, f'{origin}: the column "{_SYSTEM}"')
        read.insert(0, ({"role": "system", "content": own}, Mark()))
    if spec.drop_system_message and read[0][0]["role"] == "system":
        read = read[1:] or read
    messages, marks = zip(*read, strict=True)
    return Conversation(list(messages), marks, _tools(row, origin, spec.field_tools))


def role_words(spec: DatasetSpec) -> dict[str, str]:
    """The template's role for each word that a data set has for one."""
    given = spec.roles or DEFAULT_ROLES
    return {word: role for role, words in given.items() for word in words}


def _message(given: Any, where: str, spec: DatasetSpec) -> tuple[Message, Mark]:
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be an object with a role and a content, got {given!r:.40}.")
    names = {"role": "role", "content": "content", **(spec.message_property_mappings or {})}
    message = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    taken = {*names.values(), spec.message_field_training, spec.message_field_training_detail}
    # Parquet fills the keys that a message lacks with null.
    message |= {k: v for k, v in given.items() if k not in taken and v is not None}
    content = message.get("content")
    for ours in ("role", "content"):
        present = ours in message or (ours == "content" and message.get("tool_calls"))
        if not present or (ours == "role" and not isinstance(message["role"], str)):
            raise UserError(
                f'{where} has no "{names[ours]}"; keys found: {", ".join(map(str, given))} '
                "(set message_property_mappings)."
            )
    if content is None and message.get("tool_calls"):
        message["content"] = ""
    elif not isinstance(content, str | list):
        kind = "null" if content is None else type(content).__name__
        raise UserError(f'{where}: "{names["content"]}" is {kind}; expected text.')
    for text in texts_in(message):
        check_text(text, where)
    message["role"] = role_words(spec).get(message["role"], message["role"])
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"], where)
    mark = _mark(given, message, where, spec)
    if spec.split_thinking and message["role"] == "assistant" and mark.parts is None:
        message = _without_thoughts(message, spec.template_thinking_key)
    return message, mark


def _mark(given: Mapping[str, Any], message: Message, where: str, spec: DatasetSpec) -> Mark:
    """What a message says of its training; flags of its parts join them to one text."""
    key, detail_key = spec.message_field_training, spec.message_field_training_detail
    flag = given.get(key) if key else None
    if flag not in (None, True, False):
        raise UserError(f'{where}: "{key}" is {str(flag)[:40]}; expected true or false.')
    parts = _flagged(message, where, spec)
    detail = given.get(detail_key) if detail_key else None
    if detail is not None:
        if parts is not None or not isinstance(message["content"], str):
            raise UserError(f'{where}: "{detail_key}" needs a content that is one text.')
        parts = _detailed(detail, len(message["content"]), f'{where}: "{detail_key}"')
    if flag is None and parts is not None:
        return Mark(bool(parts), parts)
    return Mark(None if flag is None else bool(flag), parts)


def _flagged(message: Message, where: str, spec: DatasetSpec) -> tuple[tuple[int, int], ...] | None:
    """The trained parts of a content whose parts have flags, which becomes one text."""
    content = message["content"]
    if not isinstance(content, list) or not any(
        isinstance(part, Mapping) and part.keys() & {"train", "weight"} for part in content
    ):
        return None
    text, spans = "", []
    for number, part in enumerate(content, 1):
        own = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(own, str):
            raise UserError(f"{where}: part {number} of a content with training flags has no text.")
        flag = part.get("train", part.get("weight"))
        if flag not in (None, True, False):
            raise UserError(
                f"{where}: train or weight of part {number} is {str(flag)[:40]}; expected true or "
                "false (1 or 0)."
            )
        if own and (message["role"] in spec.roles_to_train if flag is None else flag):
            spans.append((len(text), len(text) + len(own)))
        text += own
    message["content"] = text
    return tuple(spans)


def _detailed(detail: Any, length: int, where: str) -> tuple[tuple[int, int], ...]:
    """The trained characters of a list of offsets, whose ends belong to them."""
    if not isinstance(detail, list):
        raise UserError(f"{where} is {type(detail).__name__}; expected a list.")
    spans = []
    for number, entry in enumerate(detail, 1):
        place = f"{where}: entry {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("train"), bool):
            raise UserError(
                f"{place} must be an object with begin_offset, end_offset and train (true or "
                f"false), got {str(entry)[:60]}."
            )
        begin, end = (entry.get(name) for name in _OFFSETS)
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < length:
            raise UserError(
                f"{place} has the offsets {begin} and {end}; expected two characters of a content "
                f"of {length}, the first not after the last."
            )
        if entry["train"]:
            spans.append((begin, end + 1))
    return tuple(spans)


def _without_thoughts(message: Message, key: str) -> Message:
    """The thoughts of an answer as a property of their own, as the templates of reasoners expect.

    The words around them are those that Axolotl knows.
    """
    content = message["content"]
    for opened, closed in _THOUGHTS if isinstance(content, str) else ():
        start, end = content.find(opened), content.find(closed)
        if 0 <= start < end:
            rest = content[end + len(closed) :].lstrip()
            first, last = rest.find(_SOLUTION[0]), rest.find(_SOLUTION[1])
            if 0 <= first < last:
                rest = rest[first + len(_SOLUTION[0]) : last].strip()
            thoughts = content[start + len(opened) : end].strip()
            return {**message, key: thoughts, "content": rest}
    return message


def _calls(calls: Any, where: str) -> Any:
    """Tool calls with their arguments as an object, which OpenAI's format writes as JSON text."""
    if not isinstance(calls, list):
        return calls
    return [_parsed(call, "arguments", f"{where}: a tool call") for call in calls]


def _parsed(tool: Any, name: str, where: str) -> Any:
    """A tool or call with the JSON text of its function's `name` read."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get(name), str):
        return tool
    try:
        value = json.loads(function[name])
    except ValueError as error:
        raise UserError(f"{where} has {name} that are not valid JSON: {error}.") from error
    return {**tool, "function": {**function, name: value}}


def _tools(row: Mapping[str, Any], origin: str, column: str) -> list[dict[str, Any]] | None:
    tools = row.get(column)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(
                f'{origin}: the column "{column}" is not valid JSON: {error}.'
            ) from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f'{origin}: the column "{column}" must be a list of objects.')
    return [_parsed(tool, "parameters", f"{origin}: a tool") for tool in tools]
