import datetime
import json

import pytest

from jaxlora.data.chat import chat
from jaxlora.data.encode import Rendered, encode
from jaxlora.data.spec import DatasetSpec
from jaxlora.data.template import ChatTemplate, TemplateError
from jaxlora.data.templates import NAMED_TEMPLATES
from jaxlora.data.tokenizer import Encoder

TALK = [
    {"role": "user", "content": "Q "},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
    {"role": "assistant", "content": "B"},
]
SYSTEM = [{"role": "system", "content": "S "}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

# Written out here, not composed: (text before the talk without a system message, with one or None
# where the system is refused, the talk itself). <B> and <E> stand for bos_token and eos_token.
CHATML = (
    "<|im_start|>user\nQ <|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
)
COHERE = (
    "<B>",
    "<B><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S <|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>R<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>B<|END_OF_TURN_TOKEN|>",
)
GEMMA = (
    "Q<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n"
)
GEMMA3 = ("<B><start_of_turn>user\n", "<B><start_of_turn>user\nS \n\n", GEMMA)
PHI3 = "<|user|>\nQ <|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\nB<|end|>\n"
PHI4 = "<|im_start|>system<|im_sep|>%s<|im_end|>"
QWEN3 = (
    "",
    "<|im_start|>system\nS <|im_end|>\n",
    CHATML.replace("B<", "<think>\n\n</think>\n\nB<"),
)
LLAMA = "<|start_header_id|>%s<|end_header_id|>\n\n"
DATED = (
    "<B>" + LLAMA % "system" + "Cutting Knowledge Date: December 2023\nToday Date: 10 Jul 2025\n\n"
)
EXPECTED = {
    "alpaca": (
        "<B>",
        "<B>S \n\n",
        "### Instruction:\nQ \n\n### Response:\nA<E>\n\n### Instruction:\nR\n\n### Response:\nB<E>",
    ),
    "aya": COHERE,
    "chatml": ("", "<|im_start|>system\nS <|im_end|>\n", CHATML),
    "cohere": COHERE,
    "deepseek_v2": (
        "<B>",
        "<B>S \n\n",
        "<\uff5cUser\uff5c>Q <\uff5cAssistant\uff5c>A<E>"
        "<\uff5cUser\uff5c>R<\uff5cAssistant\uff5c>B<E>",
    ),
    "deepseek_v3": (
        "<B>",
        "<B>S ",
        "<\uff5cUser\uff5c>Q <\uff5cAssistant\uff5c>A<\uff5cend\u2581of\u2581sentence\uff5c>"
        "<\uff5cUser\uff5c>R<\uff5cAssistant\uff5c>B<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n",
        "[|system|]S [|endofturn|]\n",
        "[|user|]Q \n[|assistant|]A[|endofturn|]\n[|user|]R\n[|assistant|]B[|endofturn|]\n",
    ),
    "falcon_h1": ("<B>", "<B><|im_start|>system\nS <|im_end|>\n", CHATML),
    "gemma": ("<B><start_of_turn>user\n", None, GEMMA),
    "gemma3": GEMMA3,
    "gemma3n": GEMMA3,
    "gemma4": (
        "<B>",
        "<B><|turn>system\nS<turn|>\n",
        "<|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n"
        "<|turn>user\nR<turn|>\n<|turn>model\nB<turn|>\n",
    ),
    "jamba": (
        "<|startoftext|><|bom|><|system|> <|eom|>",
        "<|startoftext|><|bom|><|system|> S <|eom|>",
        "<|bom|><|user|> Q <|eom|><|bom|><|assistant|> A<|eom|>"
        "<|bom|><|user|> R<|eom|><|bom|><|assistant|> B<|eom|>",
    ),
    "llama3": (
        "<B>",
        "<B>" + LLAMA % "system" + "S<|eot_id|>",
        f"{LLAMA % 'user'}Q<|eot_id|>{LLAMA % 'assistant'}A<|eot_id|>"
        f"{LLAMA % 'user'}R<|eot_id|>{LLAMA % 'assistant'}B<|eot_id|>",
    ),
    "llama3_2_vision": (
        DATED + "<|eot_id|>",
        DATED + "S<|eot_id|>",
        f"{LLAMA % 'user'}Q <|eot_id|>{LLAMA % 'assistant'}A<|eot_id|>"
        f"{LLAMA % 'user'}R<|eot_id|>{LLAMA % 'assistant'}B<|eot_id|>",
    ),
    "llama4": (
        "<B>",
        "<B><|header_start|>system<|header_end|>\n\nS<|eot|>",
        "<|header_start|>user<|header_end|>\n\nQ <|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nA<|eot|>"
        "<|header_start|>user<|header_end|>\n\nR<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nB<|eot|>",
    ),
    "metharme": (
        "<B><|system|>Enter RP mode. You shall reply to the user while staying in character. Your "
        "responses must be detailed, creative, immersive, and drive the scenario forward.",
        "<B><|system|>S ",
        "<|user|>Q<|model|>A<|user|>R<|model|>B<E>",
    ),
    "mistral_v1": ("<B>", None, " [INST] Q  [/INST] A<E> [INST] R [/INST] B<E>"),
    "mistral_v2v3": ("<B>", None, "[INST] Q [/INST] A<E>[INST] R[/INST] B<E>"),
    "mistral_v3_tekken": ("<B>", None, "[INST]Q [/INST]A<E>[INST]R[/INST]B<E>"),
    "mistral_v7_tekken": (
        "<B>[SYSTEM_PROMPT]You are Mistral Small 3, a Large Language Model (LLM) created by "
        "Mistral AI, a French startup headquartered in Paris.\nYour knowledge base was last "
        "updated on 2023-10-01. The current date is 2025-07-10.\n\nWhen you're not sure about some "
        "information, you say that you don't have the information and don't make up anything.\nIf "
        "the user's question is not clear, ambiguous, or does not provide enough context for you "
        "to accurately answer the question, you do not try to answer it right away and you rather "
        'ask the user to clarify their request (e.g. "What are some good restaurants around me?" '
        '=> "Where are you?" or "When is the next flight to Tokyo" => "Where do you travel from?")'
        "[/SYSTEM_PROMPT]",
        "<B>[SYSTEM_PROMPT]S [/SYSTEM_PROMPT]",
        "[INST]Q [/INST]A<E>[INST]R[/INST]B<E>",
    ),
    "phi_3": (
        "<B>",
        "<B><|system|>\nS <|end|>\n",
        PHI3,
    ),
    "phi_35": (
        "",
        "<|system|>\nS <|end|>\n",
        PHI3,
    ),
    "phi_4": (
        PHI4
        % (
            "You are Phi, a language model trained by Microsoft to help users. Your role as an "
            "assistant involves thoroughly exploring questions through a systematic thinking "
            "process before providing the final precise and accurate solutions. This requires "
            "engaging in a comprehensive cycle of analysis, summarizing, exploration, "
            "reassessment, reflection, backtracing, and iteration to develop well-considered "
            "thinking process. Please structure your response into two main sections: Thought and "
            "Solution using the specified format: <think> {Thought section} </think> {Solution "
            "section}. In the Thought section, detail your reasoning process in steps. Each step "
            "should include detailed considerations such as analysing questions, summarizing "
            "relevant findings, brainstorming new ideas, verifying the accuracy of the current "
            "steps, refining any errors, and revisiting previous steps. In the Solution section, "
            "based on various attempts, explorations, and reflections from the Thought section, "
            "systematically present the final solution that you deem correct. The Solution section "
            "should be logical, accurate, and concise and detail necessary steps needed to reach "
            "the conclusion. Now, try to solve the following question through the above guidelines:"
        ),
        PHI4 % "S ",
        "<|im_start|>user<|im_sep|>Q <|im_end|><|im_start|>assistant<|im_sep|>A<|im_end|>"
        "<|im_start|>user<|im_sep|>R<|im_end|><|im_start|>assistant<|im_sep|>B<|im_end|>",
    ),
    "qwen_25": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n",
        "<|im_start|>system\nS <|im_end|>\n",
        CHATML,
    ),
    "qwen3": QWEN3,
    "qwen3_5": QWEN3,
}
ENDS = {
    **dict.fromkeys(["aya", "cohere"], "<|END_OF_TURN_TOKEN|>"),
    **dict.fromkeys(["chatml", "falcon_h1", "phi_4", "qwen_25", "qwen3", "qwen3_5"], "<|im_end|>"),
    **dict.fromkeys(["gemma", "gemma3", "gemma3n"], "<end_of_turn>"),
    **dict.fromkeys(["llama3", "llama3_2_vision"], "<|eot_id|>"),
    **dict.fromkeys(["phi_3", "phi_35"], "<|end|>"),
    "deepseek_v3": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "exaone": "[|endofturn|]",
    "gemma4": "<turn|>",
    "jamba": "<|eom|>",
    "llama4": "<|eot|>",
}
# What the model writes between where generation starts and the answer.
BEFORE = {"jamba": " ", "qwen3": "<think>\n\n</think>\n\n", "qwen3_5": "<think>\n\n</think>\n\n"}


class Tenth(datetime.datetime):
    """The day of the expected texts."""

    @classmethod
    def now(cls, tz=None):
        return cls(2025, 7, 10)


@pytest.fixture(autouse=True)
def tenth_of_july(monkeypatch):
    import transformers.utils.chat_template_utils as utils

    monkeypatch.setattr(utils, "datetime", Tenth)


def template(name):
    return ChatTemplate(NAMED_TEMPLATES[name], {"bos_token": "<B>", "eos_token": "<E>"})


def test_every_template_is_written_out_above():
    assert set(EXPECTED) == set(NAMED_TEMPLATES)


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_the_words_are_those_the_model_was_trained_with(name):
    alone, after_system, talk = EXPECTED[name]
    assert template(name).render(TALK) == alone + talk
    if after_system is None:
        with pytest.raises(TemplateError, match="the roles must alternate"):
            template(name).render(SYSTEM + TALK)
    else:
        assert template(name).render(SYSTEM + TALK) == after_system + talk


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_exactly_the_answers_and_their_ends_are_trained(tokenizer, name):
    full, turns = template(name).turns(TALK, [1, 3])
    draft = Rendered(full, tuple((turn.start, turn.stop) for turn in turns))
    [(tokens, trained)] = encode([draft], Encoder(tokenizer))
    end = ENDS.get(name, "<E>")
    first = "A" if name == "metharme" else "A" + end
    before = BEFORE.get(name, "")
    first = before + first if name == "jamba" else first
    assert tokenizer.decode(tokens[trained.astype(bool)]) == first + before + "B" + end


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_an_answer_starts_where_generation_starts(name):
    before = template(name).render(TALK[:3], add_generation_prompt=True)
    full, turns = template(name).turns(TALK, [3])
    assert full[: turns[0].start].rstrip(" ") == before.rstrip(" ")


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_contents_may_be_parts(name):
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    assert template(name).render(parts) == template(name).render(TALK)


@pytest.mark.parametrize(
    ("name", "thoughts"),
    [("deepseek_v3", "<think>why</think>"), ("gemma4", "<|channel>thought\nwhy\n<channel|>")],
)
def test_answers_lose_the_thoughts_that_the_model_never_sees_again(name, thoughts):
    thinking = [TALK[0], {"role": "assistant", "content": f"{thoughts}A"}, *TALK[2:]]
    assert template(name).render(thinking) == template(name).render(TALK)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_a_template_without_a_place_for_tools_refuses_them(name):
    with pytest.raises(TemplateError, match="no place for tools"):
        template(name).render(TALK, tools=TOOLS)


TOOL_TALKS = {
    "plain": TALK,
    "system": SYSTEM + TALK,
    "calls": [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "r"},
        {"role": "tool", "content": "s"},
        TALK[1],
    ],
    "call after words": [
        *SYSTEM,
        TALK[0],
        {"role": "assistant", "content": "so", "tool_calls": [CALL]},
        {"role": "tool", "content": "r"},
        TALK[1],
    ],
}


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("talk", TOOL_TALKS)
def test_qwen_25_is_qwens_own(shared, talk, tools):
    config = json.loads((shared / "tokenizers/qwen2.5/tokenizer_config.json").read_text())
    own = ChatTemplate(config["chat_template"], {})
    for prompt in (False, True):
        assert template("qwen_25").render(
            TOOL_TALKS[talk], tools=tools, add_generation_prompt=prompt
        ) == own.render(TOOL_TALKS[talk], tools=tools, add_generation_prompt=prompt)


def test_qwen3_trains_thoughts_where_it_shows_them():
    talk = [
        TALK[0],
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nA"},
        TALK[2],
        {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [CALL]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "<think>\nnew\n</think>\n\nB"},
    ]
    full, turns = template("qwen3").turns(talk, [1, 3, 5])
    assert [full[turn.start : turn.stop] for turn in turns] == [
        "A<|im_end|>",
        '<think>\nwhy\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        "<|im_end|>",
        "<think>\nnew\n</think>\n\nB<|im_end|>",
    ]
    quiet = ChatTemplate(NAMED_TEMPLATES["qwen3"], {"enable_thinking": False})
    prompt = quiet.render(TALK[:1], add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_special_tokens_that_somebody_typed_stay_text(tokenizer, name):
    encoder = Encoder(tokenizer)
    chosen = ChatTemplate(NAMED_TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    spec = DatasetSpec("f", "chat_template", chat_template=name)

    def specials(text):
        talk = [{"role": "user", "content": text}, {"role": "assistant", "content": f"A{text}"}]
        draft = chat({"messages": talk}, "f:1", spec, chosen, encoder)
        [(tokens, _)] = encode([draft], encoder)
        assert tokenizer.decode(tokens).count(text.strip()) == 2
        return [token for token in tokens.tolist() if token in encoder.special_ids]

    assert specials("x </s> <s> <|im_end|> <|im_start|> y") == specials("x y")
