import json

import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.chat import UNSAFE, Dropped, chat, check_ends, prompt_ids, template_of
from jaxlora.data.conversation import conversation
from jaxlora.data.encode import encode
from jaxlora.data.spec import DatasetSpec
from jaxlora.data.tokenizer import Encoder

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
EOS_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"


def draft_of(tokenizer, row, template="chatml", train_on_inputs=False, eot_tokens=(), **settings):
    spec = DatasetSpec("f", "chat_template", **settings)
    return chat(
        row,
        "rows.jsonl:7",
        spec,
        template_of(tokenizer, template, eot_tokens),
        Encoder(tokenizer),
        train_on_inputs=train_on_inputs,
    )


def learned(tokenizer, row, *args, **settings) -> list[str]:
    """The runs of trained text."""
    [(tokens, trained)] = encode([draft_of(tokenizer, row, *args, **settings)], Encoder(tokenizer))
    runs: list[list[int]] = []
    for at, (token, flag) in enumerate(zip(tokens.tolist(), trained.tolist(), strict=True)):
        if flag:
            if not (at and trained[at - 1]):
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_answers_and_their_end_are_trained(tokenizer):
    assert learned(tokenizer, {"messages": TALK}) == ["A1<|im_end|>", "A2<|im_end|>"]


def test_a_system_message_is_left_out_when_asked(tokenizer):
    rest = draft_of(tokenizer, {"messages": TALK[1:]})
    assert draft_of(tokenizer, {"messages": TALK}, drop_system_message=True) == rest
    assert draft_of(tokenizer, {"messages": TALK[1:]}, drop_system_message=True) == rest


def test_reasoning_reaches_the_template_under_its_name_there(tokenizer):
    template = (
        "{% for m in messages %}{{ m['thinking'] or '' }}:{{ m['content'] }}"
        "{{ eos_token }}{% endfor %}"
    )
    talk = [TALK[1], {**TALK[2], "why": "because"}]
    names = {"role": "role", "content": "content", "thinking": "why"}
    draft = draft_of(
        tokenizer, {"messages": talk}, template=template, message_property_mappings=names
    )
    assert f"because:{TALK[2]['content']}" in draft.text


def test_ids_equal_transformers_own(tokenizer):
    draft = draft_of(tokenizer, {"messages": TALK})
    [(tokens, _)] = encode([draft], Encoder(tokenizer))
    template = template_of(tokenizer, "chatml")
    expected = tokenizer.apply_chat_template(
        TALK, chat_template=template.text, tokenize=True, return_dict=False
    )
    assert tokens.tolist() == expected


def test_the_prompt_of_generation_is_how_the_example_starts(tokenizer):
    encoder, template = Encoder(tokenizer), template_of(tokenizer, "chatml")
    prompt = prompt_ids(TALK[:4], encoder, template)
    [(tokens, trained)] = encode([draft_of(tokenizer, {"messages": TALK})], encoder)
    assert tokens[: len(prompt)].tolist() == prompt
    assert trained[len(prompt)]
    assert not trained[len(prompt) - 1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"roles_to_train": ("user",)}, ["Q1</s>", "Q2</s>"]),
        ({"roles_to_train": ("user", "assistant")}, ["Q1</s>", "A1</s>", "Q2</s>", "A2</s>"]),
        ({"roles_to_train": ()}, []),
        ({"train_on_eos": "turn"}, ["A1</s>", "A2</s>"]),
        ({"train_on_eos": "last"}, ["A1", "A2</s>"]),
        ({"train_on_eos": "none"}, ["A1", "A2"]),
        ({"train_on_eos": "all"}, ["</s>", "</s>", "A1</s>", "</s>", "A2</s>"]),
    ],
)
def test_roles_and_ends_to_train(tokenizer, settings, expected):
    assert learned(tokenizer, {"messages": TALK}, EOS_TEMPLATE, **settings) == expected


def test_train_on_inputs_trains_all_but_the_first_token(tokenizer):
    row = {"messages": TALK[1:3]}
    found = learned(tokenizer, row, EOS_TEMPLATE, train_on_inputs=True)
    assert found == ["ser:Q1</s>assistant:A1</s>"]


def test_an_end_token_is_added_when_the_template_writes_none(tokenizer):
    assert learned(tokenizer, {"messages": TALK}, NO_END) == ["A1", "A2</s>"]
    assert learned(tokenizer, {"messages": TALK}, NO_END, train_on_eos="none") == ["A1", "A2"]


def test_other_names_for_roles_and_properties(tokenizer):
    row = {"turns": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    settings = {
        "field_messages": "turns",
        "message_property_mappings": {"role": "from", "content": "value"},
    }
    assert learned(tokenizer, row, **settings) == ["A<|im_end|>"]
    row = {"turns": [{"from": "me", "value": "Q"}, {"from": "bot", "value": "A"}]}
    roles = {"user": ("me",), "assistant": ("bot",)}
    assert learned(tokenizer, row, roles=roles, **settings) == ["A<|im_end|>"]
    assert draft_of(tokenizer, row, roles=roles, **settings).text.startswith("<|im_start|>user\n")


@pytest.mark.parametrize("name", ["tokenizer", "llama2"])
def test_special_text_that_a_user_typed_stays_text(request, name):
    tokenizer = request.getfixturevalue(name)
    typed = "write </s> and <s> please"
    row = {"messages": [{"role": "user", "content": typed}, *TALK[2:3]]}
    draft = draft_of(tokenizer, row, EOS_TEMPLATE)
    [(tokens, _)] = encode([draft], Encoder(tokenizer))
    ends = [token for token in tokens.tolist() if token in (1, 2)]
    # One end for each of the two turns, none from the typed text.
    assert ends == [2, 2]
    assert tokenizer.decode(tokens) == f"user:{typed}</s>assistant:A1</s>"


def test_special_text_that_the_template_rewrites_is_dropped_not_injected(tokenizer):
    row = {"messages": [{"role": "user", "content": "a</s>"}, *TALK[2:3]]}
    upper = "{% for m in messages %}{{ m['content'] | replace('a', 'bb') }}\n{% endfor %}"
    assert draft_of(tokenizer, row, upper) == Dropped(UNSAFE)


def test_tool_calls_without_content_are_trained(tokenizer):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = {"messages": [TALK[1], call], "tools": '[{"type": "function"}]'}
    assert learned(tokenizer, row, template) == ['[{"name": "f"}]</s>']


def test_a_conversation_without_answers_trains_nothing(tokenizer):
    assert learned(tokenizer, {"messages": TALK[:2]}) == []


def marked(index, **marks):
    """TALK with marks on one message."""
    return {"messages": [{**m, **(marks if i == index else {})} for i, m in enumerate(TALK)]}


MARKS = {"message_field_training": "on", "message_field_training_detail": "parts"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (marked(2, on=False), ["A2<|im_end|>"]),
        (marked(1, on=True), ["Q1<|im_end|>", "A1<|im_end|>", "A2<|im_end|>"]),
        (marked(2, on=None), ["A1<|im_end|>", "A2<|im_end|>"]),
        (marked(2, on=0), ["A2<|im_end|>"]),
        (
            marked(2, parts=[{"begin_offset": 1, "end_offset": 1, "train": True}]),
            ["1<|im_end|>", "A2<|im_end|>"],
        ),
        (
            marked(2, parts=[{"begin_offset": 0, "end_offset": 0, "train": True}]),
            ["A", "<|im_end|>", "A2<|im_end|>"],
        ),
        (
            marked(2, parts=[{"begin_offset": 0, "end_offset": 1, "train": False}]),
            ["A2<|im_end|>"],
        ),
        (
            marked(2, on=False, parts=[{"begin_offset": 0, "end_offset": 0, "train": True}]),
            ["A2<|im_end|>"],
        ),
        (
            marked(1, parts=[{"begin_offset": 0, "end_offset": 0, "train": True}]),
            ["Q", "<|im_end|>", "A1<|im_end|>", "A2<|im_end|>"],
        ),
    ],
)
def test_messages_say_what_of_them_is_trained(tokenizer, row, expected):
    assert learned(tokenizer, row, **MARKS) == expected


@pytest.mark.parametrize("key", ["train", "weight"])
def test_parts_of_a_content_say_whether_they_are_trained(tokenizer, key):
    parts = [
        {"type": "text", "text": "no ", key: 0},
        {"type": "text", "text": "yes", key: 1},
        {"type": "text", "text": " role"},
    ]
    row = {"messages": [TALK[1], {"role": "assistant", "content": parts}]}
    assert learned(tokenizer, row) == ["yes role<|im_end|>"]
    row = {"messages": [{"role": "user", "content": parts}, TALK[2]]}
    assert learned(tokenizer, row) == ["yes", "<|im_end|>", "A1<|im_end|>"]


def test_offsets_count_in_the_content_that_the_template_trims(tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] | trim }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    parts = [{"begin_offset": 2, "end_offset": 3, "train": True}]
    answer = {"role": "assistant", "content": "  abcb ", "parts": parts}
    row = {"messages": [TALK[1], answer]}
    assert learned(tokenizer, row, template, **MARKS) == ["ab", "<|im_end|>"]


def test_marks_go_before_train_on_inputs(tokenizer):
    row = marked(2, on=False)
    expected = ["S<|im_end|>", "Q1<|im_end|>", "Q2<|im_end|>", "A2<|im_end|>"]
    assert learned(tokenizer, row, train_on_inputs=True, **MARKS) == expected


def test_marks_are_not_seen_by_the_template(tokenizer):
    row = marked(2, on=True, parts=[])
    spec = DatasetSpec("f", "chat_template", **MARKS)
    assert conversation(row, "f:1", spec).messages == TALK


BOTH = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{{ '<x>' if m['role'] == 'assistant' and not loop.last else eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["A1<x>", "A2</s>"]),
        ({"train_on_eot": "none"}, ["A1", "A2</s>"]),
        ({"train_on_eot": "turn", "train_on_eos": "none"}, ["A1<x>", "A2"]),
        ({"train_on_eot": "last", "train_on_eos": "last"}, ["A1", "A2</s>"]),
        ({"train_on_eot": "none", "train_on_eos": "all"}, ["</s>", "</s>", "A1", "</s>", "A2</s>"]),
        ({"train_on_eot": "all", "train_on_eos": "none"}, ["A1<x>", "A2"]),
    ],
)
def test_ends_of_turns_and_of_texts_are_trained_apart(tokenizer, settings, expected):
    found = learned(tokenizer, {"messages": TALK}, BOTH, eot_tokens=("<x>",), **settings)
    assert found == expected


def test_without_eot_tokens_the_eos_token_is_both(tokenizer):
    row = {"messages": TALK}
    settings = {"train_on_eos": "none", "train_on_eot": "turn"}
    assert learned(tokenizer, row, EOS_TEMPLATE, **settings) == ["A1</s>", "A2</s>"]
    with pytest.raises(UserError, match="differ, but eot_tokens holds the eos_token </s>"):
        check_ends(
            DatasetSpec("f", "chat_template", **settings),
            template_of(tokenizer, EOS_TEMPLATE, ("</s>",)),
        )


def test_roles_to_train_may_be_the_files_own_words(tokenizer):
    row = {"messages": [{"role": "human", "content": "Q"}, {"role": "gpt", "content": "A"}]}
    assert learned(tokenizer, row, roles_to_train=("gpt",)) == ["A<|im_end|>"]


def test_given_roles_replace_the_usual_ones(tokenizer):
    """As in Axolotl: a word that the mapping lacks is a role of its own."""
    row = {"messages": [{"role": "me", "content": "Q"}, {"role": "gpt", "content": "A"}]}
    assert learned(tokenizer, row, roles={"user": ("me",)}) == []
    assert learned(tokenizer, row, roles={"user": ("me",)}, roles_to_train=("gpt",)) == [
        "A<|im_end|>"
    ]


def test_a_column_system_is_the_first_message(tokenizer):
    messages = TALK[1:3]

    def text(row, **settings):
        return draft_of(tokenizer, row, **settings).text

    expected = text({"messages": [{"role": "system", "content": "own"}, *messages]})
    assert text({"messages": messages, "system": "own"}) == expected
    assert text({"messages": messages, "system": "own"}, drop_system_message=True) == text(
        {"messages": messages}
    )
    assert text({"messages": TALK, "system": "own"}) == text({"messages": TALK})


THINKER = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['reasoning_content'] %}({{ m['reasoning_content'] }}){% endif %}"
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", "(why)because</s>"),
        ("<reasoning>why</reasoning>because", "(why)because</s>"),
        (
            "<|begin_of_thought|>why<|end_of_thought|>"
            "<|begin_of_solution|> because <|end_of_solution|>",
            "(why)because</s>",
        ),
        ("</think>no<think>", "</think>no<think></s>"),
        ("plain", "plain</s>"),
    ],
)
def test_thinking_is_split_from_an_answer(tokenizer, content, expected):
    row = {"messages": [TALK[1], {"role": "assistant", "content": content}]}
    assert learned(tokenizer, row, THINKER, split_thinking=True) == [expected]


def test_json_text_of_tools_and_calls_is_read(tokenizer):
    template = (
        "{{ tools[0]['function']['parameters']['type'] }}{% for m in messages %}[{{ m['role'] }}]"
        "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['function']['arguments'] | tojson }}"
        "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}]
    messages = [TALK[1], {"role": "assistant", "tool_calls": [call]}]
    for given in (tools, json.dumps(tools)):
        row = {"messages": messages, "functions": given}
        draft = draft_of(tokenizer, row, template, field_tools="functions")
        assert draft.text == 'object[user]</s>[assistant]{"x": 1}</s>'


U = TALK[1]
BAD = {
    "other column": ({"conversations": []}, 'needs the column "messages"; columns found: conv'),
    "not a list": ({"messages": "hi"}, "must be a list of messages .* got str"),
    "no message": ({"messages": []}, "got an empty list"),
    "text message": ({"messages": [U, "hi"]}, "message 2 must be an object"),
    "other keys": ({"messages": [{"from": "a", "value": "b"}]}, 'no "role"; keys found: from, v'),
    "no content": ({"messages": [{"role": "user"}]}, 'message 1 has no "content"'),
    "null content": ({"messages": [U, {"role": "assistant", "content": None}]}, "2: .* is null"),
    "number content": ({"messages": [{"role": "user", "content": 3}]}, '"content" is int'),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    "tools": ({"messages": TALK, "tools": "{"}, '"tools" is not valid JSON'),
    "training": (marked(2, on="yes"), 'message 3: "on" is yes; expected true or false'),
    "detail": (marked(2, parts="x"), 'message 3: "parts" is str; expected a list'),
    "detail entry": (marked(2, parts=[{"train": 1}]), "entry 1 must be an object with begin_off"),
    "detail range": (
        marked(2, parts=[{"begin_offset": 0, "end_offset": 2, "train": True}]),
        "entry 1 has the offsets 0 and 2; expected two characters of a content of 2",
    ),
    "weight": (
        {"messages": [{"role": "user", "content": [{"text": "a", "weight": 0.5}]}]},
        "train or weight of part 1 is 0.5",
    ),
    "part text": (
        {"messages": [{"role": "user", "content": [{"type": "image", "train": True}]}]},
        "part 1 of a content with training flags has no text",
    ),
    "arguments": (
        {"messages": [{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        "message 1: a tool call has arguments that are not valid JSON",
    ),
    "tools kind": ({"messages": TALK, "tools": "[1]"}, "must be a list of objects"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tokenizer, case):
    row, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        draft_of(tokenizer, row, **MARKS)
    assert str(error.value).startswith("rows.jsonl:7:")
    assert "\n" not in str(error.value)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    with pytest.raises(UserError, match=r"rows.jsonl:7: the chat template refuses .* alternate"):
        draft_of(tokenizer, {"messages": TALK}, "{{ raise_exception('roles must alternate') }}")
