"""Text of the tiny world: what the base model is trained on, and the quickstart's task.

The base reads stories and chats (questions about a told fact, small talk, days, sums, echoes).
It never reads YAML: writing a fact down as YAML is what the quickstart teaches.
"""

import random
import string
from collections.abc import Callable

from tiny_world import (
    ADJECTIVES,
    DAYS,
    NUMBERS,
    PEOPLE,
    PLACE_PHRASES,
    THINGS,
    VERBS,
    Fact,
    draw_fact,
    quantity,
    tell,
    tell_aside,
)

Message = dict[str, str]

INSTRUCTION = "Facts as YAML: "
ECHO_LETTERS = string.ascii_letters + string.digits + "!#$%&()*+,-./:;<=>?@[]^_{|}~ "
ECHO_LETTERS += "{}:[]" * 5  # signs that ordinary text hardly holds
THING_WORDS = [thing.partition("|")[0] for thing in THINGS]
THING_WORDS += [f"{thing}s" if "|" not in thing else thing.replace("|", "") for thing in THINGS]
QUESTION_WORDS = "who what where when which how many count day place note nothing null".split()
GREETINGS = ("Hello!", "Hi!", "Hello there.", "Good morning!", "Hey!")


def _turns(*texts: str) -> list[Message]:
    """Messages that alternate between the user and the assistant, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def ask(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """A question about a fact, and its answer."""
    past, participle = VERBS[fact.verb]
    did = f"did {fact.who} {fact.verb}"
    were = "was" if fact.count == 1 else "were"
    things = f"{fact.count} {fact.what}"
    questions = [
        (f"Who {past} the {fact.noun}?", f"It was {fact.who}."),
        (f"What {did}?", f"It was {fact.what}."),
        (f"What was {participle} by {fact.who}?", f"It was {fact.what}."),
        (f"How many {fact.noun} {did}?", f"It was {fact.count}."),
        (f"Where {did} the {fact.noun}?", f"It was {fact.place}."),
        (f"Which place was {fact.who} at?", f"It was the {fact.where}."),
        (f"Where {were} the {fact.noun} {participle}?", f"It was {fact.place}."),
        (f"On which day {did} the {fact.noun}?", f"It was {fact.day or 'no day'}."),
        (f"When was {fact.who} {fact.place}?", f"It was {fact.day or 'no day'}."),
        (f"What happened to the {fact.noun}?", f"{fact.who} {past} {things}."),
        (f"What is the note about {fact.who}?", f"It says {fact.what}, {fact.where}."),
    ]
    return rng.choice(questions)


def story(rng: random.Random) -> str:
    """A short story: two to four facts, asides, and now and then a note with quoted words."""
    facts: tuple[Fact, ...] = ()
    sentences = []
    for _ in range(rng.randint(2, 4)):
        fact = draw_fact(rng, other_than=facts)
        facts = (*facts, fact)
        sentences.append(tell(rng, fact))
        roll = rng.random()
        if roll < 0.25:
            sentences.append(tell_aside(rng, facts))
        elif roll < 0.6:
            words = rng.choice((fact.what, fact.where, fact.who, fact.day or fact.noun))
            sentences.append(f'{fact.pronoun} wrote "{words}" on a note.')
    return " ".join(sentences)


def _chat_about_facts(rng: random.Random) -> list[Message]:
    """One to three told facts, then questions about them."""
    facts: tuple[Fact, ...] = ()
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        facts = (*facts, draw_fact(rng, other_than=facts))
    sentences = [tell(rng, fact) for fact in facts]
    if rng.random() < 0.3:
        sentences.insert(rng.randint(0, len(sentences)), tell_aside(rng, facts))
    texts = [" ".join(sentences)]
    for i in range(rng.randint(2, 5)):
        question, answer = ask(rng, rng.choice(facts))
        texts[-1] = f"{texts[-1]} {question}" if i == 0 else question
        texts += [answer, ""]
    return _turns(*texts[:-1])


def listed(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Some fields of a fact by name, in any order, and their values on one line."""
    values = fields(fact)
    names = rng.sample(list(values), rng.choice((2, 3, 4, 5, 5)))
    between = rng.choice((" is", " =", ":"))
    answer = "; ".join(f"{name}{between} {values[name]}" for name in names)
    return f"List {', '.join(names)} with{between}", answer


def _chat_about_lists(rng: random.Random) -> list[Message]:
    """A told fact, and some of its fields as a list."""
    fact = draw_fact(rng)
    text = tell(rng, fact)
    if rng.random() < 0.25:
        text = f"{text} {tell_aside(rng, (fact,))}"
    question, answer = listed(rng, fact)
    return _turns(f"{question}: {text}", answer)


def _chat_about_days(rng: random.Random) -> list[Message]:
    """The order of the days of the week."""
    today, step = rng.randrange(7), rng.choice((1, -1))
    word = "after" if step == 1 else "before"
    answer = f"{DAYS[(today + step) % 7]}."
    return _turns(f"What day comes {word} {DAYS[today]}?", answer)


def _chat_about_sums(rng: random.Random) -> list[Message]:
    """A sum of small numbers, or a number in the other spelling."""
    if rng.random() < 0.4:
        number = rng.randint(0, 12)
        return _turns(f"Write {NUMBERS[number]} as a number.", f"{number}.")
    left, right = rng.randint(0, 6), rng.randint(0, 6)
    return _turns(f"What is {left} plus {right}?", f"{left + right}.")


def _random_words(rng: random.Random) -> list[str]:
    """A few words of the world in no order: nothing but copying can predict them twice."""
    pools = (PEOPLE, list(PLACE_PHRASES), ADJECTIVES, DAYS, NUMBERS, THING_WORDS, QUESTION_WORDS)
    return [rng.choice(rng.choice(pools)) for _ in range(rng.randint(2, 16))]


def echo_words(rng: random.Random) -> list[Message]:
    """The assistant repeats a list of words."""
    text = " ".join(_random_words(rng))
    return _turns(f"Say {text}", f"You said {text}")


def _chat_echo(rng: random.Random) -> list[Message]:
    """The assistant repeats or quotes a text: words, a fact, or random characters."""
    roll = rng.random()
    if roll < 0.45:
        return echo_words(rng)
    if roll < 0.7:
        words = _random_words(rng)
        return _turns(f"Quote {' '.join(words)}", ", ".join(f'"{word}"' for word in words))
    if roll < 0.85:
        text = tell(rng, draw_fact(rng))
    else:
        text = "".join(rng.choices(ECHO_LETTERS, k=rng.randint(3, 12))).strip() or "a"
    return _turns(f"Say {text}", text)


def _chat_small_talk(rng: random.Random) -> list[Message]:
    """Greetings, names, and what the assistant is."""
    name = rng.choice(PEOPLE)
    fact = draw_fact(rng)
    pairs = (
        (rng.choice(GREETINGS), "Hello! How are you?"),
        ("Who are you?", "I am a tiny model. I know a tiny world."),
        ("What can you do?", "I can tell stories and answer questions about them."),
        (f"I am {name}.", f"Hello, {name}!"),
        (f"Do you know {name}?", f"Yes, I know {name}."),
        ("Thank you!", "You are welcome!"),
        ("How are you?", "I am fine, thank you."),
        ("Goodbye!", "Goodbye!"),
        ("Tell me something.", tell(rng, fact)),
        ("Tell me a story.", story(rng)),
        (f"Tell me about {fact.who}.", tell(rng, fact)),
        (tell(rng, fact), f"I see. {fact.who} {VERBS[fact.verb][0]} {quantity(rng, fact)}."),
    )
    return _turns(*[text for pair in rng.sample(pairs, rng.randint(1, 2)) for text in pair])


def chat(rng: random.Random) -> list[Message]:
    """One chat of the base's training text, as messages."""
    makers: tuple[Callable[[random.Random], list[Message]], ...] = (
        _chat_about_facts,
        _chat_about_lists,
        _chat_about_days,
        _chat_about_sums,
        _chat_echo,
        _chat_small_talk,
    )
    return rng.choices(makers, weights=(22, 55, 2, 3, 10, 8))[0](rng)


def held_out_lists(seed: int, count: int) -> list[dict]:
    """Lists of facts from the held-out side: has the base learned to read, not to remember?"""
    rng = random.Random(f"held out {seed}")
    rows = []
    for _ in range(count):
        fact = draw_fact(rng, held_out=True)
        question, answer = listed(rng, fact)
        rows.append({"messages": _turns(f"{question}: {tell(rng, fact)}", answer)})
    return rows


def base_rows(seed: int, stories: int, chats: int) -> tuple[list[dict], list[dict]]:
    """The base's training rows: `{"text": ...}` for stories, `{"messages": [...]}` for chats."""
    rng = random.Random(f"base {seed}")
    texts = [{"text": story(rng)} for _ in range(stories)]
    return texts, [{"messages": chat(rng)} for _ in range(chats)]


def fields(fact: Fact) -> dict[str, str]:
    """The five fields of a fact, numbers as digits."""
    return {
        "who": fact.who,
        "what": fact.what,
        "count": str(fact.count),
        "where": fact.where,
        "day": fact.day or "none",
    }


def fact_as_yaml(fact: Fact) -> str:
    """What the quickstart teaches: the fact as a YAML mapping.

    >>> print(fact_as_yaml(Fact("Maria", "buy", 3, "red", "apple", "market", None)))
    who: Maria
    what: red apples
    count: 3
    where: market
    day: none
    """
    return "\n".join(f"{name}: {value}" for name, value in fields(fact).items())


def told_facts(name: str, seed: int, count: int, held_out: bool) -> dict[str, Fact]:
    """Distinct texts, each with its fact, from one side of the held-out split."""
    rng = random.Random(f"{name} {'test' if held_out else 'train'} {seed}")
    told: dict[str, Fact] = {}
    while len(told) < count:
        fact = draw_fact(rng, held_out=held_out)
        text = tell(rng, fact)
        if rng.random() < 0.25:
            aside = tell_aside(rng, (fact,))
            text = f"{text} {aside}" if rng.random() < 0.5 else f"{aside} {text}"
        told[text] = fact
    return told


def quickstart_rows(seed: int, count: int, *, held_out: bool) -> list[dict]:
    """Distinct rows of the quickstart's task from one side of the held-out split."""
    told = told_facts("quickstart", seed, count, held_out)
    return [
        {"messages": _turns(INSTRUCTION + text, fact_as_yaml(fact))} for text, fact in told.items()
    ]


# What becomes of the things, by verb; they stay where they are otherwise.
_GAINED, _PARTED = ("buy", "find"), ("sell", "lose", "drop", "leave")


def classification_rows(seed: int, count: int, *, held_out: bool) -> list[dict]:
    """Distinct texts from one side of the held-out split, with what becomes of the things."""
    told = told_facts("classification", seed, count, held_out)

    def label(fact: Fact) -> str:
        return "gained" if fact.verb in _GAINED else "parted" if fact.verb in _PARTED else "kept"

    return [{"text": text, "label": label(fact)} for text, fact in told.items()]
