"""What a finished run tells: its result, the loss curve and the model card."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.config.load import dump_config
from jaxlora.core.version import __version__
from jaxlora.data.tokenizer import pad_id
from jaxlora.models.task import task_of
from jaxlora.training.metrics import METRICS_FILE, read_lines
from jaxlora.training.plot import LOSS_PLOT, plot_losses
from jaxlora.training.setup import Plan


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
      output_dir: the run's folder; holds the adapter or model, the curve and the card.
      steps: optimizer steps done in all.
      loss: last training loss in nats per trained token, or per text of a classifier.
      eval_loss, eval_loss_before: held-out loss after and before, None without held-out data.
      exact_match, exact_match_before: share of exact held-out answers, if asked for.
      tokens_per_s: throughput, compilation and evaluation left out, padding not counted.
      accuracy, accuracy_before: of a classifier, share of right labels in the held-out data.
      seconds: what the time went to, by phase; together the time since `train` was called.
    """

    output_dir: Path
    steps: int
    loss: float
    eval_loss: float | None
    eval_loss_before: float | None
    exact_match: float | None
    exact_match_before: float | None
    tokens_per_s: float
    accuracy: float | None = None
    accuracy_before: float | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, such as ``{"step": 10, "loss": 1.2, ...}``."""
        return read_lines(self.output_dir / METRICS_FILE)


def write_report(plan: Plan, result: TrainResult) -> None:
    """Writes the loss curve and the model card."""
    unit = "text" if plan.labels else "token"
    title = Path(plan.config.base_model).name
    plot_losses(result.history, result.output_dir / LOSS_PLOT, title, unit=unit)
    (result.output_dir / "README.md").write_text(_card(plan, result))


def _card(plan: Plan, result: TrainResult) -> str:
    config, task = plan.config, task_of(plan.model.cfg)
    adapter = plan.model.lora is not None
    front = {
        "base_model": config.base_model,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task.pipeline,
    }
    rows = [
        ("steps", f"{result.steps}"),
        ("training loss, last step", f"{result.loss:.4f}"),
        ("held-out loss before", _number(result.eval_loss_before)),
        ("held-out loss after", _number(result.eval_loss)),
        ("held-out accuracy before", _share(result.accuracy_before)),
        ("held-out accuracy after", _share(result.accuracy)),
        ("held-out exact match before", _share(result.exact_match_before)),
        ("held-out exact match after", _share(result.exact_match)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    return f"""---
{_front_matter(front)}
tags:
- jaxlora
---
# {result.output_dir.name}

{"LoRA adapter for" if adapter else "Full fine-tune of"} `{config.base_model}`, trained with
jaxlora {__version__}. To load it:

```python
{_use(plan)}
```

| result | |
|---|---|
{table}

![loss]({LOSS_PLOT})

## Configuration

```yaml
{dump_config(config).strip()}
```
"""


def _use(plan: Plan) -> str:
    """How transformers, and PEFT for an adapter, load the result from its folder."""
    model, labels, cfg = plan.model, plan.labels, plan.model.cfg
    auto = task_of(cfg).auto_class
    if model.lora is None:
        return (
            f"from transformers import {auto}\n\n"
            f"model = {auto}.from_pretrained(folder)  # where this file is"
        )
    head = ""  # what has to be said of one that the base lacks
    if labels is not None:
        named = f", id2label={dict(enumerate(labels.names))}" if labels.names else ""
        head = f", num_labels={labels.count}{named}"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}\n",
        f"model = {auto}.from_pretrained({plan.config.base_model!r}{head})",
    ]
    if cfg.vocab_size != model.stored.vocab_size:
        lines.append(f"model.resize_token_embeddings({cfg.vocab_size}, mean_resizing=False)")
    if labels is not None and cfg.pooling == "last":  # by which it finds the last token of a text
        lines.append(f"model.config.pad_token_id = {pad_id(model.tokenizer)}")
    return "\n".join(
        [*lines, "model = PeftModel.from_pretrained(model, folder)  # where this file is"]
    )


def _front_matter(fields: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in fields.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
