"""A chat template: rendering a conversation, and finding a turn in the rendered text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Message = dict[str, Any]

# End-of-turn texts of the templates in use, beside the tokenizer's eos_token and `eot_tokens`.
KNOWN_ENDS = (
    *("</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>"),
    *("<turn|>", "<|END_OF_TURN_TOKEN|>", "<|end|>", "<|EOT|>", "<|endoftext|>", "<|eot|>"),
    *("<|eom|>", "[|endofturn|]", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
# Keys whose values a template compares with words; all other texts are what somebody wrote.
_WORDS = {"role", "type", "id", "tool_call_id", "name"}
_PLACEHOLDER = re.compile(r"jxq(\d+)qxj")


class TemplateError(ValueError):
    """The template refuses a conversation, or what to train on cannot be found in its text."""


@dataclass(frozen=True)
class Turn:
    """Characters [start, end) are the answer, [end, stop) its end token (empty if none)."""

    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class ChatTemplate:
    """A template's jinja text with the special tokens it may write."""

    text: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    eot_tokens: tuple[str, ...] = ()

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """End-of-turn texts, longest first."""
        eos = self.variables.get("eos_token")
        found = {*self.eot_tokens, *KNOWN_ENDS, *([str(eos)] if eos else [])}
        return tuple(sorted(found, key=lambda text: (-len(text), text)))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Any = None,
    ) -> str:
        """The conversation as text (jinja runs in transformers' sandbox).

        Raises:
            TemplateError: the template raises on it.
        """
        return self._render(messages, tools, add_generation_prompt)[0]

    def turns(
        self, messages: Sequence[Message], indices: Sequence[int], tools: Any = None
    ) -> tuple[str, list[Turn]]:
        """The rendered text, and where in it the messages at `indices` are.

        First by rendering the conversation up to each turn and checking that this is how the
        whole text starts; else by `{% generation %}` markers; else from where generation would
        start to an end token, if a turn at the end ends so; else by where the contents are.

        Raises:
            TemplateError: none of the four finds every turn.
        """
        full = self.render(messages, tools=tools)
        found = (
            self._by_prefix(full, messages, indices, tools)
            or self._by_markers(messages, indices, tools)
            or self._by_start(full, messages, indices, tools)
            or self._by_content(full, messages, indices, tools)
        )
        if found is None:
            raise TemplateError(
                "the chat template rewrites earlier turns, so what to train on cannot be found; "
                "mark the answers in it with {% generation %} ... {% endgeneration %}"
            )
        return full, found

    def contents(
        self, full: str, messages: Sequence[Message], tools: Any = None
    ) -> list[tuple[int, int, int]] | None:
        """``(message, start, stop)`` of every text of the messages in the rendered text.

        Found by rendering with placeholders and matching; None when the template changes a text by
        more than trimming or JSON quoting.
        """
        places = self._places(full, messages, tools)
        return None if places is None else [(i, start, stop) for i, _, start, stop in places]

    def content(
        self, full: str, messages: Sequence[Message], index: int, turn: Turn, tools: Any = None
    ) -> tuple[int, int, int]:
        """``(start, stop, cut)``: where the content of a message is in the rendered text.

        `cut` is how many of its first characters the template leaves out.

        Raises:
            TemplateError: the content is not there as it is, or more than once.
        """
        content = messages[index]["content"]
        places = self._places(full, messages, tools) or []
        found = [place[2:] for place in places if place[:2] == (index, content)]
        if len(found) != 1:
            core = content.strip()
            start = full.find(core, turn.start, turn.end)
            if start < 0 or full.find(core, start + 1, turn.end) >= 0:
                raise TemplateError(
                    f"the chat template rewrites message {index + 1}, so the characters to train "
                    "on cannot be found in it"
                )
            found = [(start, start + len(core))]
        start, stop = found[0]
        cut = content.find(full[start:stop])
        if cut < 0:
            raise TemplateError(
                f"the chat template quotes the content of message {index + 1}, so the characters "
                "to train on cannot be found in it"
            )
        return start, stop, cut

    def _places(
        self, full: str, messages: Sequence[Message], tools: Any
    ) -> list[tuple[int, str, int, int]] | None:
        """``(message, text, start, stop)`` of every text of the messages, or None."""
        texts: list[tuple[int, str]] = []
        masked = [_masked(message, i, texts) for i, message in enumerate(messages)]
        try:
            rendered = self.render(masked, tools=tools)
        except TemplateError:
            return None
        pattern, last, owners = "", 0, []
        for match in _PLACEHOLDER.finditer(rendered):
            message, text = texts[int(match[1])]
            owners.append((message, text))
            pattern += re.escape(rendered[last : match.start()]) + f"({_forms(text)})"
            last = match.end()
        whole = re.fullmatch(pattern + re.escape(rendered[last:]), full)
        if whole is None:
            return None
        return [(*owner, *whole.span(i)) for i, owner in enumerate(owners, 1)]

    @cached_property
    def _writes_prompt(self) -> bool:
        """Whether `add_generation_prompt` changes anything."""
        probe = [{"role": "user", "content": "a"}]
        try:
            return self.render(probe) != self.render(probe, add_generation_prompt=True)
        except TemplateError:
            return "add_generation_prompt" in self.text

    def _by_prefix(
        self, full: str, messages: Sequence[Message], indices: Sequence[int], tools: Any
    ) -> list[Turn] | None:
        turns = []
        for i in indices:
            try:
                last = i == len(messages) - 1
                upto = full if last else self.render(messages[: i + 1], tools=tools)
                before = self.render(messages[:i], add_generation_prompt=True, tools=tools)
            except TemplateError:
                return None
            if not (full.startswith(upto) and upto.startswith(before)):
                return None
            start = len(before)
            content = messages[i].get("content")
            if not self._writes_prompt and isinstance(content, str):
                # The turn's own header, if it has one, belongs to the prompt.
                start += max(0, upto[start:].find(content.strip()))
            turns.append(self._turn(full, start, len(upto)))
        return turns

    def _by_markers(
        self, messages: Sequence[Message], indices: Sequence[int], tools: Any
    ) -> list[Turn] | None:
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.text):
            return None
        text, blocks = self._render(messages, tools, False, markers=True)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(blocks) != len(answers) or not set(indices) <= set(answers):
            return None
        return [self._turn(text, *blocks[answers.index(i)]) for i in indices]

    def _by_start(
        self, full: str, messages: Sequence[Message], indices: Sequence[int], tools: Any
    ) -> list[Turn] | None:
        """For templates that write less of an answer once more follows (its thoughts go)."""
        ends = re.compile("|".join(map(re.escape, self.ends)))
        turns = []
        for i in indices if self._writes_prompt else ():
            before = self.render(messages[:i], add_generation_prompt=True, tools=tools)
            alone = self.render(messages[: i + 1], tools=tools)
            if not (full.startswith(before) and alone.startswith(before)):
                return None
            # What is left of the answer is how it ends where nothing follows.
            alone, start = alone[len(before) :].rstrip(), len(before)
            spans = (end.span() for end in ends.finditer(full, start))
            span = next((each for each in spans if alone.endswith(full[start : each[1]])), None)
            if span is None:
                return None
            turns.append(Turn(start, *span))
        return turns or None

    def _by_content(
        self, full: str, messages: Sequence[Message], indices: Sequence[int], tools: Any
    ) -> list[Turn] | None:
        places = self.contents(full, messages, tools)
        if places is None:
            return None
        turns = []
        for i in indices:
            mine = [(start, stop) for message, start, stop in places if message == i]
            if len(mine) != 1:
                return None
            turns.append(self._turn(full, *mine[0]))
        return turns

    def _turn(self, full: str, start: int, stop: int) -> Turn:
        """Finds the end token in or right after a turn; white space after it is not trained."""
        body = start + len(full[start:stop].rstrip())
        for end in self.ends:
            if full[start:body].endswith(end):
                return Turn(start, body - len(end), body)
        after = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.ends)) + ")")
        match = after.match(full, body)
        return Turn(start, body, match.end() if match else body)

    def _render(
        self, messages: Sequence[Message], tools: Any, prompt: bool, markers: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, blocks = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.text,
                tools=tools,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=markers,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TemplateError(f"the chat template refuses the conversation: {reason}") from error
        spans: Any = blocks[0] if blocks else []
        return texts[0], spans


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a message but the words that templates compare (role, type, ids)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _WORDS:
                yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def _masked(value: Any, owner: int, texts: list[tuple[int, str]]) -> Any:
    """Replaces each text by a numbered placeholder; blank texts stay: templates test for them."""
    if isinstance(value, str):
        if not value.strip():
            return value
        texts.append((owner, value))
        return f"jxq{len(texts) - 1}qxj"
    if isinstance(value, Mapping):
        return {k: v if k in _WORDS else _masked(v, owner, texts) for k, v in value.items()}
    if isinstance(value, list):
        return [_masked(item, owner, texts) for item in value]
    return value


def _forms(text: str) -> str:
    """A pattern of the ways a template writes a text."""
    forms = {text, text.strip(), text.lstrip(), text.rstrip()}
    forms |= {json.dumps(form, ensure_ascii=False)[1:-1] for form in forms}
    return "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
