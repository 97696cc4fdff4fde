"""What becomes of each key of a file, and what follows from them, in words."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlora.config import derived
from jaxlora.config.check import key
from jaxlora.config.load import Examined
from jaxlora.config.notes import notes, read_as
from jaxlora.config.roles import no_effect
from jaxlora.config.schema import SECTIONS, Config
from jaxlora.config.values import Section
from jaxlora.config.wording import section_of

ACTS, READ_AS, NO_EFFECT, NOT_SET, REFUSED = (
    "acted on",
    "read as something else",
    "no effect",
    "not set",
    "refused",
)
_NEEDS_DATA = "needs the data"


def key_roles(examined: Examined) -> dict[str, tuple[str, str]]:
    """Returns the role of every key of the file and, but for acted on and not set, the reason."""
    refused = {key(problem.path): problem.text for problem in examined.problems}
    # The notes speak of a whole configuration.
    noted = dict(line.split(": ", 1) for line in ([] if refused else notes(examined.config)))
    roles = {}
    for name, value, ours in _leaves(examined.values, Config, ""):
        text = noted.get(name)
        if name in refused:
            continue
        if value is None:
            roles[name] = NOT_SET, ""
        elif not ours and (reason := no_effect(name, value)):
            roles[name] = NO_EFFECT, reason
        elif text is not None and text.startswith("no effect: "):
            roles[name] = NO_EFFECT, text.removeprefix("no effect: ")
        elif text is not None or not ours:
            roles[name] = READ_AS, text or read_as(name) or ""
        else:
            roles[name] = ACTS, ""
    return roles | {name: (REFUSED, text) for name, text in refused.items()}


def _leaves(
    values: Mapping[str, Any], section: type[Section], prefix: str
) -> Iterator[tuple[str, Any, bool]]:
    """Yields each key, those of nested sections by their path, its value, and if it is ours."""
    for name, value in values.items():
        path, field = f"{prefix}{name}", section.model_fields.get(name)
        inner = section_of(field.annotation) if field else None
        if inner is None or not isinstance(value, Mapping | list):
            yield path, value, field is not None or bool(prefix)
            continue
        items = {path: value} if isinstance(value, Mapping) else dict(_numbered(path, value))
        for place, item in items.items():
            if isinstance(item, Mapping):
                yield from _leaves(item, inner, f"{place}.")
            else:
                yield place, item, True


def _numbered(path: str, values: list[Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"{path}[{i}]", value) for i, value in enumerate(values))


def describe_keys(examined: Examined) -> str:
    """Returns the keys of the file by their role."""
    roles = key_roles(examined)
    parts = []
    for role in (ACTS, READ_AS, NO_EFFECT, NOT_SET, REFUSED):
        chosen = {name: text for name, (its, text) in roles.items() if its == role}
        if not chosen:
            continue
        if role in (ACTS, NOT_SET):
            body = textwrap.fill(", ".join(chosen), 100, break_on_hyphens=False)
        else:
            body = table(list(chosen.items()))
        parts.append(f"{role} ({len(chosen)}):\n{textwrap.indent(body, '  ')}")
    return "\n".join(parts)


def describe_values(config: Config) -> str:
    """Returns every key with its value as YAML; defaults are marked."""
    lines = []
    for section in SECTIONS:
        lines.append(f"# {section.__doc__}")
        for name in section.model_fields:
            if name == "foreign":
                continue
            value = config.model_dump(mode="json", include={name}, exclude_none=True).get(name)
            line = f"{name}: {json.dumps(value, ensure_ascii=False)}"
            lines.append(line if name in config.model_fields_set else f"{line}  # default")
    return "\n".join(lines)


def describe_derived(
    config: Config, *, replicas: int | None = None, steps_per_epoch: int | None = None
) -> str:
    """Returns what follows from several keys.

    Args:
      config: a whole configuration.
      replicas: devices on the data and fsdp axes; None where they are not known.
      steps_per_epoch: None where the data have not been read.
    """
    total = None
    if steps_per_epoch is not None or (config.max_steps and config.num_epochs is None):
        total = derived.total_steps(config, steps_per_epoch or 1)
    rows = [
        ("frozen base", _storage(config)),
        ("adapter", _adapter(config)),
        ("optimizer", derived.optimizer(config)),
        *_batch(config, replicas),
        ("steps", _NEEDS_DATA if total is None else f"{total:,}"),
        ("warm-up", _warmup(config, total)),
        ("checkpoints", _cadence(config, "save", steps_per_epoch, total)),
        ("evaluation", _cadence(config, "eval", steps_per_epoch, total)),
        ("log lines", _logging(config, total)),
    ]
    return table(rows)


def _storage(config: Config) -> str:
    plan = derived.quantization(config)
    if config.adapter is None:
        return "none: every weight trains" if not config.unfrozen_parameters else "as loaded"
    if plan is None:
        return "as loaded"
    tables = config.quantize_embeddings
    return (
        plan.format
        + (", scales quantized too" if plan.double_quant else "")
        + (f"; embedding and head {tables}" if tables else "")
    )


def _adapter(config: Config) -> str:
    if config.adapter is None:
        return "none"
    targets = derived.lora_targets(config)
    names = targets if isinstance(targets, str) else ", ".join(targets)
    names = ", ".join(filter(None, [names, *derived.lora_target_parameters(config)]))
    return f"rank {config.lora_r}, alpha {config.lora_alpha:g}, on {names}"


def _batch(config: Config, replicas: int | None) -> Iterator[tuple[str, str]]:
    rows, length = config.micro_batch_size, config.sequence_len
    each, known = "", replicas
    if config.batch_size is not None:
        count = config.batch_size
    elif known is None:
        count, each = rows * derived.accumulation_steps(config, 1), " for each data or fsdp device"
    else:
        count = rows * derived.accumulation_steps(config, known) * known
    yield "rows per step", f"{count:,}{each}"
    padded = "" if derived.pads_to_sequence_len(config) else "at most "
    yield "tokens per step", f"{padded}{count * length:,}{each}"


def _warmup(config: Config, total: int | None) -> str:
    steps, ratio = config.warmup_steps, config.warmup_ratio
    share = steps if steps and steps < 1 else ratio
    if total is None and (steps is None or share == steps):
        limit = ", 100 at most" if share is None else ""
        return (
            f"{0.03 if share is None else share:.1%} of the steps{limit}; the number {_NEEDS_DATA}"
        )
    return _steps(derived.warmup_steps(config, total or 0))


def _cadence(config: Config, verb: str, steps_per_epoch: int | None, total: int | None) -> str:
    if verb == "eval" and not derived.has_held_out(config):
        return "none: no data is held out"
    every = derived.save_every if verb == "save" else derived.eval_every
    last = "at the end" if verb == "save" else "before and after training"
    steps, times = getattr(config, f"{verb}_steps"), getattr(config, f"{verb}s_per_epoch")
    off = every(config, 1) is None
    fixed = steps is not None and (steps >= 1 or total is not None)
    if steps_per_epoch is None and not (off or fixed):
        asked = f"{steps:.1%} of the run" if steps else f"{times or 1} in an epoch"
        return f"{asked}; the number {_NEEDS_DATA}"
    found = every(config, steps_per_epoch or 1)
    return f"only {last}" if found is None else f"every {_steps(found)}, and {last}"


def _logging(config: Config, total: int | None) -> str:
    if total is None and config.logging_steps is None:
        return f"0.5% of the steps, 1 to 10; the number {_NEEDS_DATA}"
    return f"every {_steps(derived.logging_steps(config, total or 1))}"


def _steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


def table(rows: list[tuple[str, str]]) -> str:
    """Returns two columns of text.

    >>> table([("a", "x"), ("long", "y")])
    'a     x\\nlong  y'
    """
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
