"""The usual kind of chat template: what is written around the messages of a role, as jinja."""

from collections.abc import Mapping
from dataclasses import dataclass

CONTENT = (
    "{% set content = message['content'] if message['content'] is string else message['content']"
    " | selectattr('text', 'defined') | map(attribute='text') | join %}"
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'the roles must alternate: user, assistant, user, ...') }}{% endif %}"
)
_NO_TOOLS = (
    "{% if tools %}{{ raise_exception('it has no place for tools; use the tokenizer\\'s own "
    "template') }}{% endif %}"
)


@dataclass(frozen=True)
class Turns:
    """What a template writes; ``{content}``, ``{role}``, ``{bos}``, ``{eos}`` stand for those.

    ``{trimmed}`` is the content without white space at its ends, ``{date}`` and ``{day}`` are of
    the preparation.

    turns: role: its form; the role "" is every other one, and without it others are refused.
    start: before everything. system: form of the first message if it is the system's, else of
    `default`; None: the system has a turn like others, if it is in `turns`. first_user: form of
    the system's message inside the first user's. between: turns. prompt: where an answer starts.
    finish: after the last turn, unless an answer starts there. trim: contents lose white space at
    their ends. forget: the word up to which answers are thoughts, which they lose.
    """

    turns: Mapping[str, str]
    prompt: str = ""
    start: str = ""
    system: str | None = None
    default: str | None = None
    first_user: str | None = None
    between: str = ""
    finish: str = ""
    alternate: bool = False
    trim: bool = False
    forget: str = ""

    @property
    def jinja(self) -> str:
        """The template.

        >>> Turns({"user": "Q: {content}"}, prompt=" A:").jinja[-64:]
        "{% endfor %}{% if add_generation_prompt %}{{ ' A:' }}{% endif %}"
        """
        head, turns = written(self.start), "messages"
        if self.system is not None or self.first_user is not None:
            head += (
                "{% set given = messages[0]['role'] == 'system' %}"
                "{% set talk = messages[1:] if given else messages %}"
            )
            turns = "talk"
        if self.system is not None:
            head += self._first()
        body = CONTENT + (_ALTERNATE if self.alternate else "") + self._shaped()
        body += self._inside_user() + self._forms()
        if self.between:
            body += f"{{% if not loop.last %}}{written(self.between)}{{% endif %}}"
        tail = f"{{% if add_generation_prompt %}}{written(self.prompt)}"
        tail += (f"{{% else %}}{written(self.finish)}" if self.finish else "") + "{% endif %}"
        loop = f"{{% for message in {turns} %}}{body}{{% endfor %}}"
        return _NO_TOOLS + head + loop + (tail if self.prompt or self.finish else "")

    def _first(self) -> str:
        assert self.system is not None
        given = CONTENT.replace("message[", "messages[0][") + written(self.system)
        text = f"{{% if given %}}{given}"
        if self.default is not None:
            form = self.system.replace("{trimmed}", "{content}").replace("{content}", self.default)
            text += f"{{% else %}}{written(form)}"
        return text + "{% endif %}"

    def _shaped(self) -> str:
        text = ""
        if self.forget:
            text = (
                "{% if message['role'] == 'assistant' %}"
                f"{{% set content = content.split({quoted(self.forget)})[-1] %}}{{% endif %}}"
            )
        return text + ("{% set content = content | trim %}" if self.trim else "")

    def _inside_user(self) -> str:
        if self.first_user is None:
            return ""
        system = CONTENT.replace("message[", "messages[0][").replace("set content", "set own")
        before = self.first_user.split("{content}")[1]
        return (
            f"{{% if given and loop.first %}}{system}"
            f"{{% set content = own + {quoted(before)} + content %}}{{% endif %}}"
        )

    def _forms(self) -> str:
        branches = [
            f"if message['role'] == {quoted(role)} %}}{written(form)}"
            for role, form in self.turns.items()
            if role
        ]
        other = (
            written(self.turns[""])
            if "" in self.turns
            else "{{ raise_exception('no turn for the role ' + message['role']) }}"
        )
        if not branches:
            return other
        return "{% " + "{% el".join(branches) + "{% else %}" + other + "{% endif %}"


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


_NAMES = {"{content}": "content", "{role}": "message['role']"}
_NAMES |= {"{bos}": "bos_token", "{eos}": "eos_token", "{trimmed}": "(content | trim)"}
_NAMES |= {"{date}": "strftime_now('%d %b %Y')", "{day}": "strftime_now('%Y-%m-%d')"}


def written(form: str) -> str:
    """A jinja expression that writes a form."""
    parts: list[str] = []
    rest = form
    while rest:
        at, name = min(
            ((rest.find(name), name) for name in _NAMES if name in rest),
            default=(len(rest), ""),
        )
        if at:
            parts.append(quoted(rest[:at]))
        if name:
            parts.append(_NAMES[name])
        rest = rest[at + len(name) :]
    # Joined by ~, which takes an undefined bos_token as nothing.
    return "{{ " + " ~ ".join(parts) + " }}" if parts else ""
