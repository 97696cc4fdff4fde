"""Conversation types with a template and columns of their own, as settings of chat_template."""

from collections.abc import Mapping
from typing import Any

_LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\\n\\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don\\'t know the "
    "answer to a question, please don\\'t share false information."
)
_LLAMA2 = (
    "{% set given = messages[0]['role'] == 'system' %}"
    "{% set talk = messages[1:] if given else messages %}"
    "{% for message in talk %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' }}"
    "{% if loop.first %}{{ '<<SYS>>\\n' }}"
    "{% if given %}{{ messages[0]['content'] }}"
    "{% else %}{{ '" + _LLAMA2_SYSTEM + "' }}{% endif %}"
    "{{ '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ message['content'] | trim }}{{ '[/INST]' if loop.first else ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
_PYGMALION = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ '<|system|>Persona: ' + message['content'].removesuffix('\\n<START>') | trim }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|> ' + message['content'] | trim }}"
    "{% else %}{{ '<|model|> ' + message['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}"
)


CHATS: Mapping[str, Mapping[str, Any]] = {
    "llama2_chat": {
        "chat_template": _LLAMA2,
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "pygmalion": {
        "chat_template": _PYGMALION,
        "field_messages": "conversations",
        "message_property_mappings": {"role": "role", "content": "value"},
        "roles": {"user": ("human",), "assistant": ("bot",), "system": ("system",)},
    },
}
"""Name of the type: the fields of `DatasetSpec` that it sets."""
