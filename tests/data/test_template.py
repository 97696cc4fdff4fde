import datetime
import json
from pathlib import Path

import pytest

from jaxlora.data.encode import Rendered, encode
from jaxlora.data.template import ChatTemplate, TemplateError
from jaxlora.data.templates import NAMED_TEMPLATES
from jaxlora.data.tokenizer import Encoder

CASES = Path(__file__).resolve().parents[3] / "shared" / "data/chat/chat_template_cases.json"

# The expected texts were made by huggingface.js, which writes a dict as JSON where Python's jinja
# (and so transformers, which users train and serve with) writes Python's repr.
OTHER_TEXT = {"MadeAgents/Hammer2.1"}

# What is trained in each case: (answer, end token) per assistant turn. Cases not named here have
# no assistant turn.
HELLO = "I'm doing great. How can I help you today?"
CALL = (
    '[{"name": "get_current_temperature", "arguments": {"location": "Paris, France", '
    '"unit": "celsius"}, "id": "abcdef123"}]'
)
TRAINED = {
    "_base": [(HELLO, "<|im_end|>")],
    # Two spaces end a turn: nothing that could be learned as an end.
    "blenderbot_small": [(HELLO, "")],
    "gpt_neox": [(HELLO, "<|endoftext|>")],
    "llama": [(HELLO + " ", "</s>")],
    "HuggingFaceH4/zephyr-7b-beta (add_generation_prompt=false)": [(HELLO, "</s>")],
    "HuggingFaceH4/zephyr-7b-gemma-v0.1": [(HELLO, "<|im_end|>")],
    "mistralai/Mixtral-8x7B-Instruct-v0.1": [(HELLO, "</s>")],
    # The generation prompt ends with the colon, so the space is the model's to write.
    "openchat/openchat-3.5-0106": [(" " + HELLO, "<|end_of_turn|>")],
    "codellama/CodeLlama-70b-Instruct-hf": [(HELLO, " <step>")],
    "Qwen/Qwen1.5-72B-Chat": [(HELLO, "<|im_end|>")],
    "h2oai/h2o-danube-1.8b-chat": [(HELLO, "</s>")],
    "TheBloke/deepseek-coder-33B-instruct-AWQ": [(HELLO, "\n<|EOT|>")],
    "abacusai/Smaug-34B-v0.1": [(HELLO + " ", "</s>")],
    "deepseek-ai/deepseek-coder-33b-instruct": [(HELLO + "\n", "<|EOT|>")],
    "mistralai/Mistral-7B-Instruct-v0.3 (JSON Schema)": [(f" [TOOL_CALLS] {CALL} ", "</s>")],
    # The generation prompt opens the thinking; the model closes it and calls the tool.
    "Qwen/Qwen3.5-4B": [
        (
            "\n</think>\n\n<tool_call>\n<function=get_temperature_date>\n<parameter=location>\n"
            "San Francisco, CA, USA\n</parameter>\n<parameter=date>\n2024-10-01\n</parameter>\n"
            "</function>\n</tool_call>",
            "<|im_end|>",
        )
    ],
    "openbmb/MiniCPM3-4B": [
        (
            '<|tool_call_start|>\n```python\nget_delivery_date(order_id="1234")\n'
            'get_delivery_date(order_id="4321")\n```\n<|tool_call_end|>\n',
            "<|im_end|>",
        ),
        (
            "<|thought_start|>\n\nI have the information you need, both orders will be delivered "
            "on the same date, 2024-09-05.\n\n<|thought_end|>\nBoth your orders will be delivered "
            "on 2024-09-05.",
            "<|im_end|>",
        ),
    ],
    "HuggingFaceTB/SmolLM3-3B": [
        (
            "<think>The user is asking for the capital of France. This is a factual question. "
            "I know this information.</think>The capital of France is Paris.",
            "<|im_end|>",
        )
    ],
    "zai-org/GLM-5.1": [
        (
            "</think><tool_call>load_tools<arg_key>names</arg_key>"
            '<arg_value>["get_weather", "get_time"]</arg_value></tool_call>',
            "",
        )
    ],
}
EOT_TOKENS = {"codellama/CodeLlama-70b-Instruct-hf": ("<step>",)}


def cases():
    if not CASES.is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason="needs the shared data folder"))]
    found = json.loads(CASES.read_text(encoding="utf-8"))
    assert len(found) == 27
    assert set(TRAINED) <= {case["name"] for case in found}
    return [pytest.param(case, id=case["name"]) for case in found]


def parts(case):
    variables = dict(case["data"])
    messages, tools = variables.pop("messages"), variables.pop("tools", None)
    prompt = variables.pop("add_generation_prompt", False)
    template = ChatTemplate(case["chat_template"], variables, EOT_TOKENS.get(case["name"], ()))
    return template, messages, tools, prompt


class Tenth(datetime.datetime):
    """The day on which the expected texts were made."""

    @classmethod
    def now(cls, tz=None):
        return cls(2025, 7, 10)


@pytest.mark.parametrize("case", cases())
def test_real_templates_render_to_the_expected_text(case, monkeypatch):
    import transformers.utils.chat_template_utils as utils

    monkeypatch.setattr(utils, "datetime", Tenth)
    template, messages, tools, prompt = parts(case)
    text = template.render(messages, add_generation_prompt=prompt, tools=tools)
    if case["name"] in OTHER_TEXT:
        assert str(tools) in text
        text = text.replace(str(tools), json.dumps(tools))
    assert text == case["target"]


@pytest.mark.parametrize("case", cases())
def test_real_templates_train_exactly_the_answers_and_their_ends(case, tokenizer):
    template, messages, tools, _ = parts(case)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    full, turns = template.turns(messages, answers, tools)
    found = [(full[turn.start : turn.end], full[turn.end : turn.stop]) for turn in turns]
    assert found == TRAINED.get(case["name"], [])
    draft = Rendered(full, tuple((turn.start, turn.stop) for turn in turns))
    [(tokens, trained)] = encode([draft], Encoder(tokenizer))
    learned = tokenizer.decode(tokens[trained.astype(bool)])
    assert learned == "".join(answer + end for answer, end in found)


CHATML = ChatTemplate(NAMED_TEMPLATES["chatml"])
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "one"},
]


def trained(template: ChatTemplate, messages=TALK, indices=(1, 3)) -> list[str]:
    full, turns = template.turns(messages, indices)
    return [full[turn.start : turn.stop] for turn in turns]


def test_equal_texts_in_other_turns_are_told_apart():
    full, turns = CHATML.turns(TALK, [1, 3])
    assert trained(CHATML) == ["two<|im_end|>", "one<|im_end|>"]
    assert full[: turns[1].start].endswith("<|im_start|>assistant\n")


# Drops the first answer's thinking once a later turn follows, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if not loop.last and '</think>' in m['content'] %}{{ m['content'].split('</think>')[1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% if loop.last %}!{% endif %}{% endfor %}"
)


def test_a_template_that_is_not_a_prefix_of_itself_is_read_by_its_contents():
    assert trained(ChatTemplate(FORGETFUL)) == ["two<|im_end|>", "one<|im_end|>"]


def test_what_cannot_be_found_is_refused_not_guessed():
    talk = [*TALK[:1], {"role": "assistant", "content": "<think>a</think>two"}, *TALK[2:]]
    with pytest.raises(TemplateError, match="rewrites earlier turns"):
        trained(ChatTemplate(FORGETFUL), talk)


def test_an_answer_that_is_written_twice_is_refused():
    twice = "{% for m in messages %}{{ m['content'] }}|{{ m['content'] }}{% endfor %}"
    with pytest.raises(TemplateError, match="rewrites earlier turns"):
        trained(ChatTemplate(twice + "{{ messages | length }}"))


def test_generation_markers_are_used_where_prefixes_fail():
    marked = FORGETFUL.replace(
        "{% if not loop.last and", "{% generation %}{% if not loop.last and"
    ).replace("<|im_end|>{% if loop", "<|im_end|>{% endgeneration %}{% if loop")
    talk = [
        {"role": "assistant", "content": "<think>a</think>two"},
        {"role": "assistant", "content": "one"},
    ]
    assert trained(ChatTemplate(marked), talk, (0, 1)) == ["two<|im_end|>", "one<|im_end|>"]


def test_a_header_is_not_trained_when_the_template_ignores_the_generation_prompt():
    plain = ChatTemplate(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    )
    assert trained(plain) == ["two</s>", "one</s>"]


def test_contents_follow_trimming_and_json():
    template = ChatTemplate(
        "{% for m in messages %}<{{ m['content'] | trim }}>{{ m['x'] | tojson }}{% endfor %}"
    )
    messages = [{"role": "user", "content": " a\n", "x": {"k": 'q"q'}}]
    full = template.render(messages)
    assert full == '<a>{"k": "q\\"q"}'
    assert template.contents(full, messages) == [(0, 1, 2), (0, 10, 14)]


def test_contents_that_a_template_rewrites_are_not_found():
    template = ChatTemplate("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    assert template.contents("ABC", [{"role": "user", "content": "abc"}]) is None


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7]['role'] }}",
        "{% for",
        "{{ 1 + 'a' }}",
    ],
)
def test_a_template_that_fails_says_so(text):
    with pytest.raises(TemplateError, match="refuses the conversation"):
        ChatTemplate(text).render(TALK)


def test_a_template_cannot_reach_python():
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}").render(TALK)
