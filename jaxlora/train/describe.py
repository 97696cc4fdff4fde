"""What the log says about a run's data, weights and outcome."""

from typing import Any

import jax

from jaxlora.data.report import SourceReport
from jaxlora.lora import count
from jaxlora.train.results import TrainResult
from jaxlora.train.setup import Plan
from jaxlora.train.state import bytes_on_devices


def describe_data(plan: Plan) -> str:
    """Returns what became of the rows, and how many steps they make."""
    report = plan.data.report
    lines = [_describe_source(source) for source in report.train_sources + report.test_sources]
    table = report.train
    lines.append(
        f"data: {table.tokens:,} tokens in {table.examples:,} examples, {table.trained_tokens:,} "
        f"of them trained, longest example {table.longest}"
        + (f", packing {table.packing_efficiency:.1%} full" if table.packing_efficiency else "")
        + (" (from the cache)" if report.cached else "")
    )
    lines.append(
        f"{plan.total_steps} steps of {plan.batches.rows * plan.batches.accumulation} rows x "
        f"{plan.batches.length} tokens; {plan.steps_per_epoch} steps an epoch"
    )
    return "\n".join(lines)


def _describe_source(source: SourceReport) -> str:
    text = f"data: {source.path} [{source.split}]: {source.kept:,} of {source.read:,} rows kept"
    for reason, rows in source.dropped.items():
        text += f", {rows:,} dropped ({reason})"
    return text + (f", {source.truncated:,} truncated" if source.truncated else "")


def describe_weights(plan: Plan, trainable: Any, frozen: Any) -> str:
    """Returns sizes: parameters, trained share, bytes, devices."""
    model = plan.model
    total = sum(spec.size for spec in model.specs.values())
    trained = count(model.targets, trainable["adapter"]) if model.lora else total
    mesh = " x ".join(f"{name} {size}" for name, size in model.placement.mesh.shape.items())
    return (
        f"model: {plan.config.base_model}: {total:,} parameters, {trained:,} trained "
        f"({trained / total:.2%}); base {bytes_on_devices(frozen) / 2**20:,.1f} MiB, trained "
        f"{bytes_on_devices(trainable) / 2**20:,.1f} MiB, {model.decoder.dtype} on {mesh} "
        f"{jax.default_backend()}"
    )


def describe_result(plan: Plan, result: TrainResult) -> str:
    """Returns where the results are and how to chat with them."""
    kind = "adapter" if plan.model.lora else "model"
    lines = [f"{kind}, loss curve and model card: {result.output_dir}"]
    chat = "jaxlora chat "
    if plan.model.lora:
        chat += f"{plan.config.base_model} --adapter {plan.config.output_dir}"
    else:
        chat += f"{plan.config.output_dir}"
    lines.append(f"chat with it: {chat}")
    return "\n".join(lines)
