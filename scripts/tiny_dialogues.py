"""Conversations of the tiny world for the example configurations: several turns, and tool calls."""

import random

from tiny_corpus import fields, told_facts
from tiny_world import Fact

Message = dict[str, object]

SYSTEM = "Answer in a few words."
QUESTIONS = {
    "who": "Who was it?",
    "what": "What was it about?",
    "count": "How many?",
    "where": "Where?",
    "day": "On which day?",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Notes what somebody did.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in QUESTIONS},
            "required": list(QUESTIONS),
        },
    },
}


def conversation_rows(seed: int, count: int, *, held_out: bool) -> list[dict]:
    """Distinct ShareGPT conversations: a fact is told, then two or three questions about it."""
    told = told_facts("dialogue", seed, count, held_out)
    rng = random.Random(f"questions {seed} {held_out}")
    return [{"conversations": _conversation(rng, text, fact)} for text, fact in told.items()]


def _conversation(rng: random.Random, text: str, fact: Fact) -> list[Message]:
    asked = rng.sample(list(QUESTIONS), rng.randint(2, 3))
    questions = [QUESTIONS[name] for name in asked]
    questions[0] = f"{text} {questions[0]}"
    known = fields(fact)
    turns: list[Message] = [{"from": "system", "value": SYSTEM}]
    for question, name in zip(questions, asked, strict=True):
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": known[name]})
    return turns


def tool_rows(seed: int, count: int, *, held_out: bool) -> list[dict]:
    """Distinct conversations in which the model calls a tool and says what it has done."""
    told = told_facts("tools", seed, count, held_out)
    return [{"messages": _with_call(text, fact), "tools": [TOOL]} for text, fact in told.items()]


def _with_call(text: str, fact: Fact) -> list[Message]:
    """OpenAI's format: the arguments of a call are JSON text or an object; here the latter."""
    call = {"type": "function", "function": {"name": "note", "arguments": fields(fact)}}
    return [
        {"role": "user", "content": f"Note this: {text}"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": f"I have noted what {fact.who} did."},
    ]
