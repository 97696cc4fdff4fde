"""The named chat templates: what each writes around a message, as data from which jinja is made.

The names are Axolotl's; the words are those the models were trained with.
"""

from collections.abc import Mapping

from jaxlora.data.turn_forms import CONTENT, Turns, quoted, written


def _same(form: str) -> dict[str, str]:
    return {role: form.replace("{role}", role) for role in ("user", "assistant", "system")}


_CHATML = {"": "<|im_start|>{role}\n{content}<|im_end|>\n"}
_COHERE_TURN = "<|START_OF_TURN_TOKEN|><|%s_TOKEN|>{content}<|END_OF_TURN_TOKEN|>"
_COHERE = Turns(
    {"user": _COHERE_TURN % "USER", "assistant": _COHERE_TURN % "CHATBOT"},
    prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    start="{bos}",
    system=_COHERE_TURN % "SYSTEM",
    alternate=True,
    trim=True,
)
_GEMMA_TURNS = {
    "user": "<start_of_turn>user\n{content}<end_of_turn>\n",
    "assistant": "<start_of_turn>model\n{content}<end_of_turn>\n",
}
_GEMMA_PROMPT = "<start_of_turn>model\n"
_GEMMA3 = Turns(
    _GEMMA_TURNS,
    _GEMMA_PROMPT,
    "{bos}",
    first_user="{content}\n\n",
    alternate=True,
    trim=True,
)
# DeepSeek writes its own bars and spaces.
_DEEPSEEK = {"user": "<\uff5cUser\uff5c>{content}", "assistant": "<\uff5cAssistant\uff5c>{content}"}
_DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
_KNOWLEDGE = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{trimmed}"
_JAMBA = "<|bom|><|{role}|> {content}<|eom|>"
_PHI = "<|{role}|>\n{content}<|end|>\n"
_PHI4 = "<|im_start|>{role}<|im_sep|>{content}<|im_end|>"
_MISTRAL_SMALL = (
    "You are Mistral Small 3, a Large Language Model (LLM) created by Mistral AI, a French startup "
    "headquartered in Paris.\nYour knowledge base was last updated on 2023-10-01. The current date "
    "is {day}.\n\nWhen you're not sure about some information, you say that you don't have the "
    "information and don't make up anything.\nIf the user's question is not clear, ambiguous, or "
    "does not provide enough context for you to accurately answer the question, you do not try to "
    'answer it right away and you rather ask the user to clarify their request (e.g. "What are '
    'some good restaurants around me?" => "Where are you?" or "When is the next flight to Tokyo" '
    '=> "Where do you travel from?")'
)
_ROLE_PLAY = (
    "Enter RP mode. You shall reply to the user while staying in character. Your responses must be "
    "detailed, creative, immersive, and drive the scenario forward."
)
_PHI4_SYSTEM = (
    "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant "
    "involves thoroughly exploring questions through a systematic thinking process before "
    "providing the final precise and accurate solutions. This requires engaging in a comprehensive "
    "cycle of analysis, summarizing, exploration, reassessment, reflection, backtracing, and "
    "iteration to develop well-considered thinking process. Please structure your response into "
    "two main sections: Thought and Solution using the specified format: <think> {Thought section} "
    "</think> {Solution section}. In the Thought section, detail your reasoning process in steps. "
    "Each step should include detailed considerations such as analysing questions, summarizing "
    "relevant findings, brainstorming new ideas, verifying the accuracy of the current steps, "
    "refining any errors, and revisiting previous steps. In the Solution section, based on various "
    "attempts, explorations, and reflections from the Thought section, systematically present the "
    "final solution that you deem correct. The Solution section should be logical, accurate, and "
    "concise and detail necessary steps needed to reach the conclusion. Now, try to solve the "
    "following question through the above guidelines:"
)


def _mistral(user: str, assistant: str) -> Turns:
    return Turns({"user": user, "assistant": assistant}, start="{bos}", alternate=True)


_ROWS: Mapping[str, Turns] = {
    "alpaca": Turns(
        {
            "system": "{content}",
            "user": "### Instruction:\n{content}",
            "assistant": "### Response:\n{content}{eos}",
        },
        prompt="\n\n### Response:\n",
        start="{bos}",
        between="\n\n",
    ),
    "aya": _COHERE,
    "chatml": Turns(_CHATML, prompt="<|im_start|>assistant\n"),
    "cohere": _COHERE,
    "deepseek_v2": Turns(
        {
            "user": _DEEPSEEK["user"],
            "assistant": _DEEPSEEK["assistant"] + "{eos}",
            "system": "{content}\n\n",
        },
        prompt="<\uff5cAssistant\uff5c>",
        start="{bos}",
    ),
    "deepseek_v3": Turns(
        {"user": _DEEPSEEK["user"], "assistant": _DEEPSEEK["assistant"] + _DEEPSEEK_END},
        prompt="<\uff5cAssistant\uff5c>",
        start="{bos}",
        system="{content}",
        forget="</think>",
    ),
    "exaone": Turns(
        {"user": "[|user|]{content}\n", "": "[|{role}|]{content}[|endofturn|]\n"},
        prompt="[|assistant|]",
        system="[|system|]{content}[|endofturn|]\n",
        default="",
    ),
    "falcon_h1": Turns(_CHATML, prompt="<|im_start|>assistant\n", start="{bos}"),
    "gemma": Turns(_GEMMA_TURNS, _GEMMA_PROMPT, "{bos}", alternate=True, trim=True),
    "gemma3": _GEMMA3,
    "gemma3n": _GEMMA3,
    "gemma4": Turns(
        {
            "assistant": "<|turn>model\n{content}<turn|>\n",
            "": "<|turn>{role}\n{content}<turn|>\n",
        },
        prompt="<|turn>model\n",
        start="{bos}",
        trim=True,
        forget="<channel|>",
    ),
    "jamba": Turns(
        {"": _JAMBA},
        prompt="<|bom|><|assistant|>",
        start="<|startoftext|>",
        system=_JAMBA.replace("{role}", "system"),
        default="",
    ),
    "llama3": Turns(
        {"": _LLAMA3},
        prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        start="{bos}",
        trim=True,
    ),
    "llama3_2_vision": Turns(
        {"": _LLAMA3},
        prompt=_LLAMA3.split("{role}")[0] + "assistant<|end_header_id|>\n\n",
        start="{bos}",
        system=_LLAMA3.replace("{role}", "system").replace("{content}", _KNOWLEDGE),
        default="",
    ),
    "llama4": Turns(
        {"": "<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>"},
        prompt="<|header_start|>assistant<|header_end|>\n\n",
        start="{bos}",
        system="<|header_start|>system<|header_end|>\n\n{trimmed}<|eot|>",
    ),
    "metharme": Turns(
        {"user": "<|user|>{content}", "assistant": "<|model|>{content}"},
        prompt="<|model|>",
        start="{bos}",
        system="<|system|>{content}",
        default=_ROLE_PLAY,
        finish="{eos}",
        trim=True,
    ),
    "mistral_v1": _mistral(" [INST] {content} [/INST]", " {content}{eos}"),
    "mistral_v2v3": _mistral("[INST] {content}[/INST]", " {content}{eos}"),
    "mistral_v3_tekken": _mistral("[INST]{content}[/INST]", "{content}{eos}"),
    "mistral_v7_tekken": Turns(
        {
            "user": "[INST]{content}[/INST]",
            "assistant": "{content}{eos}",
            "system": "[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
        },
        start="{bos}",
        system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
        default=_MISTRAL_SMALL,
    ),
    "phi_3": Turns(
        {
            "system": _PHI.replace("{role}", "system"),
            "user": _PHI.replace("{role}", "user") + "<|assistant|>\n",
            "assistant": "{content}<|end|>\n",
        },
        start="{bos}",
    ),
    "phi_35": Turns(_same(_PHI), prompt="<|assistant|>\n"),
    "phi_4": Turns(
        _same(_PHI4),
        prompt="<|im_start|>assistant<|im_sep|>",
        system=_PHI4.replace("{role}", "system"),
        default=_PHI4_SYSTEM,
    ),
}

_QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)
# After the last question an answer shows its thoughts, the last one an empty block without any.
_QWEN_THOUGHTS = (
    "{% set thoughts = message['reasoning_content'] or '' %}"
    "{% if not thoughts and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if index > last.question and (thoughts or index == messages | length - 1) %}"
    "{{ '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{% set content = content.lstrip('\\n') %}{% endif %}"
)
_QWEN_LAST = (
    "{% set last = namespace(question=messages | length - 1) %}{% for message in messages %}"
    "{% if message['role'] == 'user' and not (message['content'] is string and "
    "message['content'].startswith('<tool_response>')) %}"
    "{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
)
_QWEN_CALLS = (
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] or call %}"
    "{{ '\\n' if content or not loop.first else '' }}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}"
    "{{ call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}"
)


def _qwen(default: str, thinks: bool) -> str:
    """Qwen's turns are ChatML's, with tools in the system's and their results in the user's."""
    before, after = _QWEN_TOOLS
    prompt = quoted("<|im_start|>assistant\n")
    skipped = quoted("<think>\n\n</think>\n\n")
    quiet = f"{{% if enable_thinking is false %}}{{{{ {skipped} }}}}{{% endif %}}"
    return (
        "{% set given = messages[0]['role'] == 'system' %}"
        f"{{% set system = messages[0]['content'] if given else {quoted(default)} %}}"
        "{% if tools or given or system %}{{ '<|im_start|>system\\n' + system }}"
        "{% if tools %}{{ '\\n\\n' if system else '' }}"
        f"{written(before)}{{% for tool in tools %}}{{{{ '\\n' }}}}{{{{ tool | tojson }}}}"
        f"{{% endfor %}}{written(after)}{{% endif %}}{{{{ '<|im_end|>\\n' }}}}{{% endif %}}"
        f"{_QWEN_LAST if thinks else ''}"
        "{% for message in messages %}{% set index = loop.index0 %}{% set role = message['role'] %}"
        f"{CONTENT}{{% if role == 'tool' %}}"
        "{{ '<|im_start|>user' if loop.previtem is undefined or loop.previtem['role'] != 'tool' "
        "else '' }}{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
        "{{ '<|im_end|>\\n' if loop.nextitem is undefined or loop.nextitem['role'] != 'tool' "
        "else '' }}{% elif not (role == 'system' and loop.first) %}"
        "{{ '<|im_start|>' + role + '\\n' }}"
        f"{{% if role == 'assistant' %}}{_QWEN_THOUGHTS if thinks else ''}{{{{ content }}}}"
        f"{_QWEN_CALLS}{{% else %}}{{{{ content }}}}{{% endif %}}{{{{ '<|im_end|>\\n' }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{quiet if thinks else ''}{{% endif %}}"
    )


_QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

NAMED_TEMPLATES: Mapping[str, str] = {
    **{name: row.jinja for name, row in _ROWS.items()},
    "qwen_25": _qwen(_QWEN25, thinks=False),
    "qwen3": _qwen("", thinks=True),
    "qwen3_5": _qwen("", thinks=True),
}
"""Name: jinja text."""
