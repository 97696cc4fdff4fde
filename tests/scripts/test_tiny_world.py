"""The tiny world: rebuilt from its seed, split without a leak, no YAML in the base."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts are programs, not a package

import tiny_corpus  # noqa: E402
import tiny_dialogues  # noqa: E402
import tiny_world  # noqa: E402

CLASSIFICATION = ROOT / "jaxlora" / "assets" / "classification"
QUICKSTART = ROOT / "jaxlora" / "assets" / "quickstart"
BASE = ROOT / "jaxlora" / "assets" / "tiny-llama"


def read_rows(name: str) -> list[dict]:
    """The rows of one of the bundled quickstart files."""
    lines = (QUICKSTART / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def spellings() -> dict[str, str]:
    """Singular and plural of each thing, with the thing's entry in THINGS."""
    split = {thing: thing.partition("|") for thing in tiny_world.THINGS}
    singular = {parts[0]: thing for thing, parts in split.items()}
    return singular | {parts[0] + (parts[2] or "s"): thing for thing, parts in split.items()}


def pairs_in(text: str) -> set[tuple[str, str]]:
    """Every (person, thing) that occurs anywhere in the text, however far apart."""
    words = re.findall(r"\w+", text)
    people = [name for name in tiny_world.PEOPLE if name in words]
    nouns = spellings()
    return {(name, nouns[w.lower()]) for name in people for w in words if w.lower() in nouns}


def row_pair(row: dict) -> tuple[str, str]:
    """The (person, thing) of a quickstart row, read from its answer."""
    fact = yaml.safe_load(row["messages"][1]["content"])
    return fact["who"], spellings()[fact["what"].split()[-1]]


@pytest.fixture(scope="module")
def base_rows() -> tuple[list[dict], list[dict]]:
    return tiny_corpus.base_rows(0, 1000, 4000)


def test_same_seed_gives_the_same_text_and_another_seed_another():
    assert tiny_corpus.base_rows(3, 20, 20) == tiny_corpus.base_rows(3, 20, 20)
    assert tiny_corpus.base_rows(3, 20, 20) != tiny_corpus.base_rows(4, 20, 20)


def test_an_echo_repeats_its_question_word_for_word():
    rng = random.Random(0)
    for _ in range(50):
        question, answer = (message["content"] for message in tiny_corpus.echo_words(rng))
        assert question.removeprefix("Say") == answer.removeprefix("You said")


def test_bundled_rows_are_what_the_generator_writes():
    train, test = read_rows("train.jsonl"), read_rows("test.jsonl")
    assert train == tiny_corpus.quickstart_rows(0, len(train), held_out=False)
    assert test == tiny_corpus.quickstart_rows(0, len(test), held_out=True)


def test_bundled_labels_are_what_the_generator_writes():
    for name, held_out in (("train", False), ("test", True)):
        lines = (CLASSIFICATION / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert rows == tiny_corpus.classification_rows(0, len(rows), held_out=held_out)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("task", ["dialogues", "tools"])
def test_bundled_conversations_are_what_the_generator_writes(task, held_out):
    make = {"dialogues": tiny_dialogues.conversation_rows, "tools": tiny_dialogues.tool_rows}[task]
    path = CLASSIFICATION.parent / task / ("test.jsonl" if held_out else "train.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == make(0, len(rows), held_out=held_out)


def test_no_person_and_thing_of_a_test_row_meet_in_a_training_row():
    train = {row_pair(row) for row in read_rows("train.jsonl")}
    test = {row_pair(row) for row in read_rows("test.jsonl")}
    assert len(test) > 50
    assert not train & test


def test_base_text_never_tells_a_held_out_fact(base_rows):
    stories, chats = base_rows
    told = [sentence for row in stories for sentence in row["text"].split(". ")]
    told += [s for row in chats for m in row["messages"] for s in m["content"].split(". ")]
    verbs = {word for forms in tiny_world.VERBS.values() for word in forms}
    leaks = [
        text
        for text in told
        if verbs & set(text.split())  # an echoed list of words tells nothing
        and len(pairs_in(text)) == 1
        and tiny_world.is_held_out(*pairs_in(text).pop())
    ]
    assert not leaks


def test_base_text_contains_no_yaml(base_rows):
    stories, chats = base_rows
    texts = [row["text"] for row in stories]
    texts += [m["content"] for row in chats for m in row["messages"]]
    assert not [text for text in texts if "\n" in text or "YAML" in text]


def test_every_answer_is_a_yaml_mapping_of_the_five_fields():
    for row in read_rows("train.jsonl") + read_rows("test.jsonl"):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        fact = yaml.safe_load(assistant["content"])
        assert list(fact) == ["who", "what", "count", "where", "day"]
        assert isinstance(fact["count"], int)


def test_every_field_of_an_answer_can_be_read_from_the_question():
    for row in read_rows("train.jsonl") + read_rows("test.jsonl"):
        question, fact = (
            row["messages"][0]["content"],
            yaml.safe_load(row["messages"][1]["content"]),
        )
        assert fact["who"] in question
        assert fact["where"] in question.lower()
        assert fact["what"] in question.lower()
        days = [day for day in tiny_world.DAYS if day in question]
        assert days == ([] if fact["day"] == "none" else [fact["day"]])


def test_questions_are_answered_by_their_fact():
    rng = random.Random(0)
    fact = tiny_world.Fact("Maria", "buy", 3, "red", "apple", "market", "Monday")
    answers = {tiny_corpus.ask(rng, fact) for _ in range(200)}
    assert ("Who bought the apples?", "It was Maria.") in answers
    assert ("How many apples did Maria buy?", "It was 3.") in answers
    assert ("Where did Maria buy the apples?", "It was at the market.") in answers


def test_person_and_thing_never_meet_across_the_split():
    rng = random.Random(0)
    for held_out in (False, True):
        facts = [tiny_world.draw_fact(rng, held_out=held_out) for _ in range(500)]
        assert {tiny_world.is_held_out(f.who, f.thing) for f in facts} == {held_out}


def test_chat_template_of_a_prefix_is_a_prefix_of_the_chat(base_rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(BASE), trust_remote_code=False)
    for row in base_rows[1][:50]:
        messages = row["messages"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        for n in range(1, len(messages), 2):
            prefix = tokenizer.apply_chat_template(
                messages[:n], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            assert whole[: len(prefix)] == prefix
        assert whole[0] == tokenizer.bos_token_id
        assert whole[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text", ["Maria bought 3 apples.", "h\u00e9llo \u2603\n\n\t x", "\x00 {}[]"]
)
def test_any_text_survives_the_tokenizer(text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(BASE), trust_remote_code=False)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
