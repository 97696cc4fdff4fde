"""The tiny world: people who do one thing with some objects, in a place, perhaps on a day.

Everything the embedded base model knows is a `Fact` of this world, told in some form of words.
A fact is a pure function of the random generator it is drawn from, so a seed rebuilds all text.
"""

import random
import zlib
from dataclasses import dataclass

WOMEN = "Anna Clara Emma Fatima Grace Hana Julia Maria Nadia Priya Sofia Yuki".split()
MEN = "Amir Carlos David Felix Hugo Jack Kofi Leo Noah Omar Tom Victor".split()
PEOPLE = WOMEN + MEN

# Plurals are formed by adding "s", or "es" where a bar marks it.
THINGS = (
    "apple basket bell book bottle box|es candle clock coin cookie drum feather flute hat kite "
    "lamp lemon map mirror pear ring rope shell spoon"
).split()
ADJECTIVES = "big blue green heavy new old red round shiny small".split()

PLACES = {
    "at": "bakery beach castle farm lake market museum school",
    "in": "forest garden kitchen library park tower",
    "on": "bridge hill island roof",
}
PLACE_PHRASES = {
    place: f"{preposition} the {place}"
    for preposition, places in PLACES.items()
    for place in places.split()
}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

# Plain form: (past, participle).
VERBS = {
    "buy": ("bought", "bought"),
    "sell": ("sold", "sold"),
    "find": ("found", "found"),
    "lose": ("lost", "lost"),
    "see": ("saw", "seen"),
    "hide": ("hid", "hidden"),
    "paint": ("painted", "painted"),
    "wash": ("washed", "washed"),
    "count": ("counted", "counted"),
    "break": ("broke", "broken"),
    "draw": ("drew", "drawn"),
    "drop": ("dropped", "dropped"),
    "leave": ("left", "left"),
    "carry": ("carried", "carried"),
}

HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Fact:
    """One event: `who` did `verb` to `count` times `adjective` `thing`, at `where`, on `day`."""

    who: str
    verb: str
    count: int
    adjective: str  # "" when the thing is not described
    thing: str  # an entry of THINGS
    where: str
    day: str | None

    @property
    def noun(self) -> str:
        """The thing as counted: "apple" for one, "apples" for more."""
        singular, _, ending = self.thing.partition("|")
        return singular if self.count == 1 else singular + (ending or "s")

    @property
    def what(self) -> str:
        """The thing with its adjective, without the number: "red apples"."""
        return f"{self.adjective} {self.noun}".strip()

    @property
    def place(self) -> str:
        """The place with its preposition: "at the market"."""
        return PLACE_PHRASES[self.where]

    @property
    def pronoun(self) -> str:
        """ "She" or "He"."""
        return "She" if self.who in WOMEN else "He"


def is_held_out(who: str, thing: str) -> bool:
    """Whether this person and this thing meet only in the test rows, never in any training text.

    >>> is_held_out("Maria", "apple") in (True, False)
    True
    """
    return zlib.crc32(f"{who}|{thing}".encode()) % HELD_OUT_ONE_IN == 0


def draw_fact(
    rng: random.Random,
    *,
    held_out: bool = False,
    other_than: tuple[Fact, ...] = (),
    with_day: float = 0.85,
) -> Fact:
    """Draws a fact from one side of the held-out split.

    Args:
        rng: The source of every choice.
        held_out: Which side of the split the pair (who, thing) must come from.
        other_than: Facts whose people and things must not appear again.
        with_day: The probability that the fact has a day.
    """
    who = rng.choice([name for name in PEOPLE if all(name != fact.who for fact in other_than)])
    used = {fact.thing for fact in other_than}
    things = [t for t in THINGS if is_held_out(who, t) == held_out and t not in used]
    if not things:  # a person may have no pair on the held-out side
        return draw_fact(rng, held_out=held_out, other_than=other_than, with_day=with_day)
    return Fact(
        who=who,
        verb=rng.choice(list(VERBS)),
        count=rng.randint(1, 12),
        adjective=rng.choice(ADJECTIVES) if rng.random() < 0.6 else "",
        thing=rng.choice(things),
        where=rng.choice(list(PLACE_PHRASES)),
        day=rng.choice(DAYS) if rng.random() < with_day else None,
    )


def quantity(rng: random.Random, fact: Fact) -> str:
    """The things with their number in one of its spellings: "3 red apples", "a red apple"."""
    if fact.count == 1:
        article = "an" if fact.what[0] in "aeiou" else "a"
        return f"{rng.choice((article, 'one'))} {fact.what}"
    if fact.count == 12 and rng.random() < 0.5:
        return f"a dozen {fact.what}"
    number = str(fact.count) if rng.random() < 0.5 else NUMBERS[fact.count]
    return f"{number} {fact.what}"


def upper_first(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched."""
    return text[0].upper() + text[1:]


def tell(rng: random.Random, fact: Fact) -> str:
    """Tells a fact in one of several forms, one or two sentences, without distractions."""
    past, participle = VERBS[fact.verb]
    things = quantity(rng, fact)
    who, place, pronoun = fact.who, fact.place, fact.pronoun
    were = "was" if fact.count == 1 else "were"
    if fact.day is None:
        forms = (
            f"{who} {past} {things} {place}.",
            f"{upper_first(place)}, {who} {past} {things}.",
            f"{upper_first(things)} {were} {participle} by {who} {place}.",
            f"{who} was {place}. {pronoun} {past} {things} there.",
        )
        return rng.choice(forms)
    day = fact.day
    forms = (
        f"{who} {past} {things} {place} on {day}.",
        f"On {day}, {who} {past} {things} {place}.",
        f"On {day} {place}, {who} {past} {things}.",
        f"{upper_first(place)}, {who} {past} {things} on {day}.",
        f"It was {day}. {who} {past} {things} {place}.",
        f"{who} was {place} on {day} and {past} {things}.",
        f"{upper_first(things)} {were} {participle} by {who} {place} on {day}.",
        f"{who} was {place} on {day}. {pronoun} {past} {things} there.",
    )
    return rng.choice(forms)


def tell_aside(rng: random.Random, facts: tuple[Fact, ...]) -> str:
    """A sentence beside the facts: the weather, or somebody who took no part in them."""
    other = rng.choice([name for name in PEOPLE if all(name != fact.who for fact in facts)])
    forms = (
        "The sun was warm.",
        "It rained all day.",
        "The wind was cold.",
        f"{other} was not there.",
        f"{other} only watched.",
        f"{other} stayed at home.",
        f"{other} was happy about it.",
    )
    return rng.choice(forms)
