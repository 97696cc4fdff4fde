"""From the mapping of a file to a `Config`: every problem of the file in one error."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from jaxlora.config import rules
from jaxlora.config.datasets import LEGACY_KEYS, DatasetConfig
from jaxlora.config.keys import DATASET_REFUSED, IMPLIED, MAPPED, NO_OP, REFUSED, SYNONYMS
from jaxlora.config.overrides import flag
from jaxlora.config.problem import Path, Problem
from jaxlora.config.roles import is_live, refusal
from jaxlora.config.schema import Config
from jaxlora.config.values import Section
from jaxlora.config.wording import expected, section_of
from jaxlora.core.errors import UserError, did_you_mean

_OURS = frozenset(Config.model_fields) - {"foreign"}
_DATASETS = ("datasets", "test_datasets")
_FOREIGN = (*NO_OP, *REFUSED, *MAPPED, *IMPLIED)
# With these, rows are of kinds that supervised training does not know: one reason is enough.
_OTHER_TASKS = frozenset(["rl", "reward_model", "process_reward_model"])


def check(raw: Mapping[str, Any], *, where: Callable[[Path], str]) -> Config:
    """Returns the configuration of a mapping.

    Args:
      raw: keys and values as written.
      where: the place of a key, to begin its line of an error.

    Raises:
      UserError: with one line for each problem.
    """
    config, found = examine(raw)
    if found:
        raise UserError("\n".join(line_of(problem, where) for problem in found))
    return config


def examine(raw: Mapping[str, Any]) -> tuple[Config, list[Problem]]:
    """Returns the configuration, without the keys that are wrong, and every problem found."""
    ours, found = _separate(raw)
    config, bad = _validate(ours)
    found += bad
    reported = {problem.path[0] for problem in found if problem.path}
    if reported & _OTHER_TASKS:
        found = [problem for problem in found if problem.path[0] not in _DATASETS]
    return config, found + [
        problem
        for problem in rules.problems(config)
        if reported.isdisjoint({problem.path[0], *problem.others})
    ]


def line_of(problem: Problem, where: Callable[[Path], str]) -> str:
    """Returns a problem as one line of an error."""
    place, name = where(problem.path), key(problem.path)
    if place == flag(problem.path):  # the flag says the key already
        return f"{place}: {problem.text}"
    return f"{place}: {name}: {problem.text}"


def key(path: Path) -> str:
    """Returns the path as a user writes it.

    >>> key(("datasets", 0, "type"))
    'datasets[0].type'
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _separate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Splits off the keys that are not fields of ours; mapped ones set what they mean."""
    ours: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    found: list[Problem] = []
    for name, value in raw.items():
        if name in _OURS:
            ours[name] = value
        elif reason := refusal(name, value):
            found.append(Problem((name,), reason))
        elif name not in _FOREIGN:
            found.append(Problem((name,), _unknown(name, ())))
        elif value is not None:
            foreign[name] = value
    for name in foreign.keys() & MAPPED.keys():
        found += _map(ours, name, foreign[name])
    for name in foreign.keys() & IMPLIED.keys():
        found += _imply(ours, name, foreign[name])
    if isinstance(ours.get("tokens"), Mapping):
        foreign["tokens"] = ours.pop("tokens")
        found += _name_special_tokens(ours, foreign["tokens"])
    for name in _DATASETS:
        ours[name], problems = _without_foreign(name, ours.get(name))
        found += problems
    return {**ours, "foreign": foreign}, found


def _map(ours: dict[str, Any], name: str, value: Any) -> list[Problem]:
    *parents, last = target = MAPPED[name]
    node = ours
    for parent in parents:
        copied = dict(node[parent]) if isinstance(node.get(parent), dict) else {}
        node[parent] = node = copied
    if node.get(last) is not None and node[last] != value:
        return [Problem((name,), f"it means the same as {'.'.join(target)}; set only one")]
    node[last] = value
    return []


def _imply(ours: dict[str, Any], name: str, value: Any) -> list[Problem]:
    target, implied, _ = IMPLIED[name]
    if not isinstance(value, bool):
        return [Problem((name,), f"expected true or false, not {_shown(value)}")]
    if value and not implied and ours.get(target) is True:
        return [Problem((name,), f"it contradicts {target}: true", (target,))]
    if value:
        ours[target] = implied
    return []


def _name_special_tokens(ours: dict[str, Any], names: Mapping[str, Any]) -> list[Problem]:
    """Reads `tokens` as a mapping, which is how files of old spell `special_tokens`."""
    given = ours.get("special_tokens")
    given = given if isinstance(given, Mapping) else {}
    if any(given.get(name, text) != text for name, text in names.items()):
        text = "as a mapping it means the same as special_tokens; set only one"
        return [Problem(("tokens",), text, ("special_tokens",))]
    ours["special_tokens"] = {**given, **names}
    return []


def _without_foreign(name: str, entries: Any) -> tuple[Any, list[Problem]]:
    if not isinstance(entries, list):
        return entries, []
    found = [
        Problem((name, i, sub_key), DATASET_REFUSED[sub_key])
        for i, entry in enumerate(entries)
        if isinstance(entry, dict)
        for sub_key, value in entry.items()
        if sub_key in DATASET_REFUSED and is_live(sub_key, value)
    ]
    kept = [
        {k: v for k, v in entry.items() if k not in DATASET_REFUSED}
        if isinstance(entry, dict)
        else entry
        for entry in entries
    ]
    return kept, found


def _validate(ours: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """Returns the configuration and the bad keys; those are left out, so that rules can go on."""
    try:
        return Config.model_validate(ours), []
    except ValidationError as error:
        found = {problem.path: problem for problem in map(_problem, error.errors())}
    # Inside a union, the error of the member that went deepest says it best.
    deep = {path[:end] for path in found for end in range(len(path))}
    found = {path: problem for path, problem in found.items() if path not in deep}
    bad = {path[0] for path in found}
    good = {name: value for name, value in ours.items() if name not in bad}
    stand_ins = {name: value for name, value in _REQUIRED.items() if name not in good}
    return Config.model_validate({**good, **stand_ins}), list(found.values())


_REQUIRED = {"base_model": "(missing)", "learning_rate": 1e-4}


def _problem(error: Any) -> Problem:
    """Puts pydantic's error in a user's words."""
    path: Path = ()
    section: type[Section] | None = Config
    field = None
    for part in error["loc"]:
        if section is not None and part in section.model_fields:
            field = section.model_fields[part]
            section = section_of(field.annotation)
        elif not (isinstance(part, int) and section is not None):
            # Which member of a union, or which item of a plain list.
            continue
        path = (*path, part)
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        name = str(error["loc"][-1])
        return Problem((*path, name), _unknown(name, path))
    assert field is not None, "every other error belongs to a field"
    if kind == "missing":
        return Problem(path, f"required: {field.description}")
    if kind == "value_error":
        return Problem(path, str(error["ctx"]["error"]))
    words = expected(field.annotation, field.metadata)
    if path and isinstance(path[-1], int):
        words = "a mapping"
    near = did_you_mean(value, words.replace(",", "").split()) if isinstance(value, str) else ""
    return Problem(path, f"expected {words}, not {_shown(value)}.{near}".removesuffix("."))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(name: str, parents: Path) -> str:
    if not parents and name in SYNONYMS:
        return f'unknown key. Did you mean "{SYNONYMS[name]}"?'
    known = _known_keys(Config, "")
    here = ".".join(part for part in parents if isinstance(part, str))
    elsewhere = [section for section, names in known.items() if section != here and name in names]
    if elsewhere:
        place = f"under {elsewhere[0]}" if elsewhere[0] else "at the top level"
        return f"unknown key here; it belongs {place}."
    near = did_you_mean(name, known[here])
    for section, names in known.items():
        if not near and section and (near := did_you_mean(name, names)):
            near = f"{near[:-1]} under {section}?"
    return f"unknown key.{near}"


def _known_keys(section: type[Section], prefix: str) -> dict[str, list[str]]:
    """Returns the keys of each section by its dotted name; the top level is ``""``."""
    legacy = (*LEGACY_KEYS, *DATASET_REFUSED) if section is DatasetConfig else ()
    foreign = _FOREIGN if section is Config else ()
    fields = {name: field for name, field in section.model_fields.items() if name != "foreign"}
    known = {prefix: [*fields, *legacy, *foreign]}
    for name, field in fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            known |= _known_keys(inner, f"{prefix}.{name}" if prefix else name)
    return known
