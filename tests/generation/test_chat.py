import itertools

import pytest

from jaxlora.data.chat import template_of
from jaxlora.generation.chat import COMMANDS, Session, chat
from jaxlora.generation.sampling import SamplingOptions


@pytest.fixture(scope="module")
def session(tokenizer, parrot):
    """``session(**changes) -> Session`` with a model that answers "a cat" to everything.

    To plain text that ends in "a" it adds " cat".
    """
    answer = tokenizer("a cat", add_special_tokens=False).input_ids
    chain = [tokenizer.convert_tokens_to_ids("<|assistant|>"), *answer, tokenizer.eos_token_id]
    model = parrot(dict(itertools.pairwise(chain)), len(tokenizer))

    def make(**changes) -> Session:
        options = SamplingOptions(max_new_tokens=8)
        given = {"options": options, "template": template_of(tokenizer), **changes}
        return Session(model.transformer, model.params, tokenizer, **given)

    return make


class Terminal:
    """A terminal that types `lines` and then ends; a line may be an error to raise instead."""

    def __init__(self, *lines, interrupt_at=None):
        self.lines, self.shown, self.interrupt_at = list(lines), "", interrupt_at

    def read(self, prompt):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text):
        self.shown += text
        if text == self.interrupt_at:
            raise KeyboardInterrupt


def talk(session, *lines, **options):
    terminal = Terminal(*lines, **options)
    return chat(session, terminal.read, terminal.write), terminal.shown


def contents(messages):
    return [(message["role"][0], message["content"]) for message in messages]


def test_a_conversation_keeps_its_history_until_the_input_ends(session):
    messages, shown = talk(session(system="Be brief."), "hello", "  ", "again")
    assert contents(messages) == [
        ("s", "Be brief."),
        ("u", "hello"),
        ("a", "a cat"),
        ("u", "again"),
        ("a", "a cat"),
    ]
    assert shown.count("a cat\n") == 2


def test_reset_forgets_all_but_the_system_message(session):
    messages, _ = talk(session(system="Be brief."), "hello", "/reset", "again", "/exit", "never")
    assert contents(messages) == [("s", "Be brief."), ("u", "again"), ("a", "a cat")]


def test_help_and_a_misspelt_command_list_the_commands(session):
    for line, extra in (("/help", ""), ("/rest", '"/rest" is no command. Did you mean "/reset"?')):
        messages, shown = talk(session(), line)
        assert messages == []
        assert extra in shown
        assert all(name in shown and text in shown for name, text in COMMANDS.items())


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(session):
    messages, shown = talk(session(), "hello", interrupt_at="a")
    assert contents(messages) == [("u", "hello"), ("a", "a")]
    assert "a [stopped]\n" in shown


def test_an_interrupt_while_typing_says_how_to_leave(session):
    messages, shown = talk(session(), KeyboardInterrupt(), "hello")
    assert "/exit" in shown.partition("a cat")[0]
    assert len(messages) == 2


def test_a_full_context_forgets_the_oldest_turns_and_says_so(session, tokenizer):
    long = session(system="Be brief.", options=SamplingOptions(max_new_tokens=20))
    context = long.transformer.cfg.max_context
    line = "x" * 30
    messages, shown = talk(long, *[f"{number} {line}" for number in range(4)])
    assert contents(messages)[0] == ("s", "Be brief.")
    assert contents(messages)[-2:] == [("u", f"3 {line}"), ("a", "a cat")]
    assert [role for role, _ in contents(messages)[1:]] == ["u", "a"] * (len(messages) // 2)
    assert f"0 {line}" not in [message["content"] for message in messages]
    assert f"[the oldest turn forgotten: the context of {context} tokens is full]" in shown
    assert shown.count("a cat") == 4


def test_a_line_longer_than_the_context_is_refused_and_not_kept(session):
    messages, shown = talk(session(), "hello", "x y " * 200, "/exit")
    assert "too long" in shown
    assert "" not in [message["content"] for message in messages]
    assert not any("x y" in message["content"] for message in messages)


def test_a_refused_line_leaves_the_history_as_it_was(session):
    messages, _ = talk(session(), "hello", "x y " * 200)
    assert contents(messages) == [("u", "hello"), ("a", "a cat")]


def test_without_a_template_a_line_is_continued(session):
    _, shown = talk(session(template=None), "a", "a")
    assert "No chat template" in shown
    assert shown.count(" cat\n") == 2
