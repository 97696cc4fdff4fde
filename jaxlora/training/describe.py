"""What the log says about a run's data, weights and outcome."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxlora.config import settings
from jaxlora.data.origins import origins
from jaxlora.data.report import Report, SourceReport
from jaxlora.data.table import TokenTable, decode, spans
from jaxlora.lora import count
from jaxlora.models.task import NEXT_TOKEN, task_of
from jaxlora.parallel.rules import undivided
from jaxlora.training.setup import Plan
from jaxlora.training.state import bytes_on_devices


def describe_data(plan: Plan) -> str:
    """Returns what became of the rows, and how many steps they make."""
    return (
        f"{describe_report(plan.data.report)}\n"
        f"{plan.total_steps} steps of {plan.batches.rows * plan.batches.accumulation} rows x "
        f"{plan.batches.length} tokens; {plan.steps_per_epoch} steps an epoch"
    )


def describe_report(report: Report) -> str:
    """Returns the account of a preparation: a line for each data set, one for each table."""
    lines = [_describe_source(source) for source in report.train_sources + report.test_sources]
    for name, table in (("train", report.train), ("held out", report.evaluation)):
        if table is not None:
            packed = table.packing_efficiency
            lines.append(
                f"{name}: {table.tokens:,} tokens in {table.examples:,} examples, "
                + (_counts(table.labels) or f"{table.trained_tokens:,} of them trained, ")
                + f"longest example {table.longest}"
                + (f", packed rows {packed:.1%} full" if packed else "")
            )
    return "\n".join(lines) + ("\n(tokens from the cache)" if report.cached else "")


def explain(report: Report) -> str:
    """Returns why earlier tokens could not be used, if so."""
    if report.cached:
        return "explain: the tokens were in the cache"
    if not report.missed:
        return "explain: there was no entry in the cache to compare with"
    lines = (f"\n  {line}" for line in report.missed)
    return f"explain: tokenized, as the nearest entry of the cache differs in{''.join(lines)}"


def _counts(labels: Mapping[str, int] | None, most: int = 10) -> str:
    """How many examples each label has, of the first ones."""
    listed = [f"{count:,} {name}" for name, count in (labels or {}).items()]
    more = f" and {len(listed) - most} more labels" if len(listed) > most else ""
    return f"labels {', '.join(listed[:most])}{more}, " if listed else ""


def preview(
    table: TokenTable,
    index: int,
    tokenizer: Any,
    labels: Sequence[str] = (),
    marks: tuple[str, str] = ("[", "]"),
) -> str:
    """Returns one example as text, what is trained between `marks`; its label, if any."""
    start, stop = marks
    if (labelled := table.label(index)) is not None:
        label = f"label {start}{labels[labelled[0]]}{stop}"
        return f"{decode(table[index][0], tokenizer)}\n{label}"
    return "".join(
        f"{start}{text}{stop}" if trained else text
        for text, trained in spans(table, index, tokenizer)
    )


def _describe_source(source: SourceReport) -> str:
    text = f"data: {source.path} [{source.split}]: {source.kept:,} of {source.read:,} rows kept"
    changed = {"truncated": source.truncated, "split": source.divided}
    if parts := [f"{rows:,} of them {how}" for how, rows in changed.items() if rows]:
        text += f" ({', '.join(parts)})"
    for reason, rows in source.dropped.items():
        text += f", {rows:,} dropped ({reason}; first {source.first[reason]})"
    return text


def describe_weights(plan: Plan, trainable: Any, frozen: Any) -> str:
    """Returns sizes: parameters, trained share, bytes, devices."""
    model = plan.model
    total = sum(spec.size for spec in model.specs.values())
    trained = count(model.targets, trainable["adapter"])
    trained += sum(leaf.size for leaf in trainable["params"].values())
    whole = [
        f"\nnote: {path}: {note}"
        for path, spec in model.specs.items()
        for note in undivided(model.placement.mesh, spec.axes, spec.shape)
    ]
    sizes = model.placement.mesh.shape.items()
    mesh = " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one"
    return (
        f"model: {plan.config.base_model}: {total:,} parameters, {trained:,} trained "
        f"({trained / total:.2%}); base {bytes_on_devices(frozen) / 2**20:,.1f} MiB, trained "
        f"{bytes_on_devices(trainable) / 2**20:,.1f} MiB, {model.transformer.dtype} on {mesh} "
        f"{jax.default_backend()}{''.join(whole)}"
    )


def describe_result(plan: Plan) -> str:
    """Returns where the results are and how to chat with them."""
    kind = "adapter" if plan.model.lora else "model"
    folder = plan.config.output_dir
    text = f"{kind}, loss curve and model card: {folder}"
    writes = task_of(plan.model.cfg) == NEXT_TOKEN
    return text + (f"\nchat with it: jaxlora chat {folder}" if writes else "")


def describe_rows(plan: Plan, step: int, most: int = 8) -> str:
    """Returns where the rows of training batch `step` (from 0) are, as ``file:line``."""
    specs = settings.train_specs(plan.config)
    places = origins(plan.data.report, specs, plan.batches.examples(step))
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return f"{', '.join(places[:most])}{more}"


def describe_time(seconds: Mapping[str, float]) -> str:
    """Returns what the time of a run went to.

    >>> describe_time({"setup": 1.0, "step": 3.0})
    'time: 4.0 s: setup 1.0, step 3.0'
    """
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"time: {sum(seconds.values()):.1f} s: {parts}"
