"""Rows with a conversation to drafts, by the chat template; only the trained roles' turns count."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.data.conversation import Conversation, conversation, role_words
from jaxlora.data.encode import Rendered
from jaxlora.data.spec import DatasetSpec
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


def check_ends(spec: DatasetSpec, template: ChatTemplate) -> None:
    """Checks that one token is not to be trained in two ways.

    Raises:
        UserError: train_on_eos and train_on_eot differ, and eot_tokens holds the eos_token.
    """
    eos_token, eos, eot = template.variables.get("eos_token"), spec.train_on_eos, spec.train_on_eot
    if eot not in (None, eos) and eos_token in template.eot_tokens:
        raise UserError(
            f"datasets: train_on_eos ({eos}) and train_on_eot ({eot}) of {spec.path} differ, but "
            f"eot_tokens holds the eos_token {eos_token}; set only one."
        )


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
    talk = conversation(row, origin, spec)
    messages, tools = talk.messages, talk.tools
    marked = any(mark.trained is not None for mark in talk.marks)
    everything, every_turn = train_on_inputs and not marked, train_on_inputs and marked
    words = role_words(spec)
    trained = talk.trained(
        None if every_turn else [words.get(role, role) for role in spec.roles_to_train]
    )
    try:
        text, turns = template.turns(messages, trained, tools)
        literal = ()
        if any(encoder.has_special(text) for message in messages for text in texts_in(message)):
            places = template.contents(text, messages, tools)
            if places is None:
                return Dropped(UNSAFE)
            literal = tuple((start, stop) for _, start, stop in places)
        answers = [
            _answer(text, talk, i, turn, template) for i, turn in zip(trained, turns, strict=True)
        ]
    except TemplateError as error:
        raise UserError(f"{origin}: {error}.") from error
    last = bool(turns) and trained[-1] == len(messages) - 1
    draft = _draft(text, turns, answers, last, literal, _Ends.of(spec, template, encoder))
    return dataclasses.replace(draft, spans=((0, len(draft.text)),)) if everything else draft


def _answer(
    full: str, talk: Conversation, index: int, turn: Turn, template: ChatTemplate
) -> list[tuple[int, int]]:
    """The trained characters of a turn, less its end."""
    parts = talk.marks[index].parts
    if parts is None:
        return [(turn.start, turn.end)]
    start, stop, cut = template.content(full, talk.messages, index, turn, talk.tools)
    moved = [(max(a - cut, 0) + start, min(b - cut + start, stop)) for a, b in parts]
    return [(a, b) for a, b in moved if a < b]


@dataclass(frozen=True)
class _Ends:
    """Which end tokens are trained: all, those of trained turns, the last, none.

    eos: of the tokenizer's end token. eot: of other ends of a turn.
    """

    eos: str
    eot: str
    eos_token: str | None
    eot_tokens: tuple[str, ...]
    known: tuple[str, ...]

    @classmethod
    def of(cls, spec: DatasetSpec, template: ChatTemplate, encoder: Encoder) -> "_Ends":
        eos_token = template.variables.get("eos_token")
        eot = spec.train_on_eos if spec.train_on_eot is None else spec.train_on_eot
        known = tuple(each for each in template.ends if each in encoder.special_texts)
        return cls(spec.train_on_eos, eot, eos_token, template.eot_tokens, known)

    def modes(self, end: str) -> set[str]:
        """What holds for an end token; without eot_tokens the eos_token is an end of turn too."""
        if end != self.eos_token:
            return {self.eot}
        return {self.eos} if self.eot_tokens else {self.eos, self.eot}


def _draft(
    text: str,
    turns: list[Turn],
    answers: list[list[tuple[int, int]]],
    ends_with_answer: bool,
    literal: tuple[tuple[int, int], ...],
    ends: _Ends,
) -> Rendered:
    eos = False
    if ends_with_answer and ends.eos != "none":
        final = turns[-1]
        # A template that writes no end token after the last answer would teach to go on forever.
        if final.end == final.stop and not text[final.stop :].strip():
            text, eos = text[: final.stop], True
    spans = []
    for number, (turn, answer) in enumerate(zip(turns, answers, strict=True), 1):
        modes = ends.modes(text[turn.end : turn.stop].strip())
        learned = modes & {"turn", "all"} or ("last" in modes and number == len(turns))
        spans += [*answer, *([(turn.end, turn.stop)] if learned and turn.end < turn.stop else [])]
    everywhere = tuple(each for each in ends.known if "all" in ends.modes(each)) if turns else ()
    return Rendered(text, tuple(spans), literal, eos, everywhere)
