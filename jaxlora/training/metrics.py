"""Where the numbers of a run go: JSON lines always, TensorBoard and Weights & Biases when asked."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxlora.checkpoints.manifest import write_durably
from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Takes the numbers of one step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """``{"step": 3, "loss": 1.2, ...}`` a line, flushed at once.

    Args:
      path: file to append to.
      after: lines of later steps, left by the run before a resume, are removed; what the others
        hold is not written a second time.
    """

    def __init__(self, path: Path, *, after: int):
        kept = [line for line in read_lines(path) if line["step"] <= after]
        self._known = {(line["step"], name) for line in kept for name in line}
        write_durably(path.with_suffix(".temporary"), _lines(kept))
        os.replace(path.with_suffix(".temporary"), path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        new = {name: value for name, value in values.items() if (step, name) not in self._known}
        if new:
            self._file.write(_lines([{"step": step, **new}]))
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def record_at(records: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """Returns everything the records say about one step.

    >>> record_at([{"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.7}], 2)
    {'step': 2, 'loss': 1.5, 'eval_loss': 1.7}
    """
    merged: dict[str, Any] = {}
    for record in records:
        merged |= record if record["step"] == step else {}
    return merged


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file; a last line cut off by a kill is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class TensorBoard:
    """Scalars for ``tensorboard --logdir``."""

    def __init__(self, folder: Path, *, after: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "use_tensorboard: tensorboardX is missing; pip install tensorboardX."
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; ``wandb_mode: offline`` needs no account."""

    def __init__(self, config: Config, folder: Path, *, resumed: bool):
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_project: wandb is missing; pip install wandb.") from None
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_name,
            id=config.wandb_run_id,
            mode=config.wandb_mode,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            resume="allow" if resumed and config.wandb_run_id else None,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: Config, folder: Path, *, after: int) -> list[Sink]:
    """Returns the sinks a configuration asks for; `after` is the step the run continues from."""
    sinks: list[Sink] = [JsonLines(folder / METRICS_FILE, after=after)]
    if config.use_tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", after=after))
    if derived.uses_wandb(config):
        sinks.append(WeightsAndBiases(config, folder, resumed=after > 0))
    return sinks


def write_all(sinks: Sequence[Sink], step: int, values: Mapping[str, float]) -> None:
    """Writes the numbers of one step to every sink."""
    for sink in sinks:
        sink.write(step, values)
