"""Talking with a model, line by line; the terminal is two functions, so a test can be one too."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxlora.core.errors import did_you_mean
from jaxlora.data.chat import prompt_ids
from jaxlora.data.template import ChatTemplate, Message
from jaxlora.data.tokenizer import Encoder
from jaxlora.generation.decoding import Params, stream
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.text import end_ids, pieces
from jaxlora.models.transformer import Transformer

Read = Callable[[str], str]
Write = Callable[[str], object]

COMMANDS = {
    "/reset": "forget the conversation",
    "/help": "show these commands",
    "/exit": "leave (so does Ctrl-D); Ctrl-C stops an answer",
}


@dataclasses.dataclass(frozen=True)
class Session:
    """Who answers, and how.

    Attributes:
      transformer, params, options: as for `jaxlora.generation.stream`; each answer has a seed
        of its own, counted up from `options.seed`.
      tokenizer: of transformers.
      template: how a conversation is written (`jaxlora.data.chat.template_of`); None continues each
        line as plain text, without a history.
      system: a system message that opens the conversation.
      eos_ids: ends of an answer beside those of tokenizer and template.
    """

    transformer: Transformer
    params: Params
    tokenizer: Any
    options: SamplingOptions
    template: ChatTemplate | None = None
    system: str | None = None
    eos_ids: tuple[int, ...] = ()


def chat(session: Session, read: Read, write: Write) -> list[Message]:
    """Answers lines until ``/exit`` or the end of the input; returns the conversation.

    Args:
      session: model, tokenizer and options.
      read: given a prompt text, returns the next line or raises EOFError; such as `input`.
      write: takes text as it comes, line breaks included.

    Raises:
      UserError: the chat template refuses the conversation.
    """
    talk = _Conversation(session)
    write(_greeting(session))
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            write("\n")
            return talk.messages
        except KeyboardInterrupt:
            write("\nType /exit to leave.\n")
            continue
        if line == "/exit":
            return talk.messages
        if line == "/reset":
            talk.reset()
            write("The conversation is forgotten.\n")
        elif line.startswith("/") and line.partition(" ")[0].count("/") == 1:
            write(_help(line))
        elif line:
            talk.answer(line, write)


class _Conversation:
    """The messages so far, and what the next answer is made from."""

    def __init__(self, session: Session) -> None:
        self.session, self.encoder = session, Encoder(session.tokenizer)
        self.ends = end_ids(session.tokenizer, session.template, session.eos_ids)
        self.answered = 0
        self.reset()

    def reset(self) -> None:
        system = self.session.system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def answer(self, line: str, write: Write) -> None:
        """Writes the answer to a line; both join the history, unless the answer is empty."""
        if self.session.template is None:
            self.reset()
        before = list(self.messages)
        self.messages.append({"role": "user", "content": line})
        try:
            prompt = self._prompt(write)
            said = self._say(prompt, write) if prompt else ""
        except BaseException:
            self.messages = before
            raise
        if said:
            self.messages.append({"role": "assistant", "content": said})
        else:
            self.messages = before

    def _say(self, prompt: list[int], write: Write) -> str:
        session, said = self.session, []
        options = dataclasses.replace(session.options, seed=session.options.seed + self.answered)
        self.answered += 1
        tokens = stream(session.transformer, session.params, prompt, options, self.ends)
        try:
            for piece in pieces(session.tokenizer, tokens, prompt):
                said.append(piece)
                write(piece)
            write("\n")
        except KeyboardInterrupt:
            write(" [stopped]\n")
        return "".join(said).strip()

    def _prompt(self, write: Write) -> list[int]:
        """Token ids to continue, oldest turns dropped until an answer fits; empty if none does."""
        context = self.session.transformer.cfg.max_context
        longest = context - min(self.session.options.max_new_tokens, context // 2)
        ids, dropped = self._ids(), 0
        first = int(bool(self.session.system))
        while len(ids) > longest and len(self.messages) > first + 1:
            del self.messages[first : first + 2]  # a question with its answer
            dropped += 1
            ids = self._ids()
        if len(ids) > longest:
            write(f"[too long: {len(ids)} tokens, of {longest} that leave room for an answer]\n")
            return []
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            write(f"[the oldest {turns} forgotten: the context of {context} tokens is full]\n")
        return ids

    def _ids(self) -> list[int]:
        template = self.session.template
        if template is None:
            return self.encoder.prefix + self.encoder.ids([self.messages[-1]["content"]])[0]
        return prompt_ids(self.messages, self.encoder, template)


def _greeting(session: Session) -> str:
    if session.template is None:
        return "No chat template: each line is continued as plain text. /help shows commands.\n"
    return "Type a message. /help shows commands.\n"


def _help(line: str) -> str:
    listed = "".join(f"{name:8}{text}\n" for name, text in COMMANDS.items())
    if line == "/help":
        return listed
    word = line.partition(" ")[0]
    return f'"{word}" is no command.{did_you_mean(word, COMMANDS)}\n{listed}'
