"""Which labels a run trains: how many, what they are called, and how well they are told apart."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.checkpoints import hub
from jaxlora.checkpoints.adapter import LoadedAdapter
from jaxlora.checkpoints.label_head import names_in_config
from jaxlora.checkpoints.load import read_model_config
from jaxlora.config import settings
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.data.labels import labels_of
from jaxlora.data.spec import Labels
from jaxlora.models.config import ModelConfig

_SHOWN = 30


def wanted_labels(config: Config, stored: ModelConfig, raw: Mapping[str, Any]) -> int:
    """Returns how many labels the model of a run has; 0 for a model of tokens.

    Args:
      config: the run.
      stored: the base.
      raw: content of its config.json.

    Raises:
      UserError: the base has another number of labels, or nobody says how many.
    """
    told = config.num_labels or len(config.label_names)
    classifies = any(entry.type == "classification" for entry in config.datasets)
    if not stored.num_labels:
        if classifies and not told:
            raise UserError(
                f"num_labels: {config.base_model} ({stored.family}) has no head of labels; set it "
                "to how many labels the data has."
            )
        return told
    if told not in (0, stored.num_labels):
        raise UserError(
            f"num_labels: {told}, but {config.base_model} is a classifier of {stored.num_labels} "
            f"labels; set it to {stored.num_labels}, or give the model without a head of labels."
        )
    if raw.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(
            f"base_model: {config.base_model} is for {raw['problem_type']}; only one label for "
            "each text is available."
        )
    if not classifies:
        raise UserError(
            f"datasets: {config.base_model} ({stored.family}) is a classifier; set type: "
            "classification, or give the model without a head of labels."
        )
    return stored.num_labels


def check_adapter(config: Config, start: LoadedAdapter, num_labels: int) -> None:
    """Refuses the adapter of `lora_model_dir` if it has another head than the run.

    Raises:
      UserError: it has.
    """
    if start.cfg.num_labels != num_labels:
        raise UserError(
            f"lora_model_dir: {config.lora_model_dir} has {start.cfg.num_labels or 'no'} labels "
            f"and the run {num_labels or 'none'}; expected an adapter of the same head."
        )


def declared_names(
    config: Config, stored: ModelConfig, raw: Mapping[str, Any], start: LoadedAdapter | None
) -> tuple[str, ...]:
    """Returns what the labels are called by the file, the adapter or the base; perhaps nothing.

    Args:
      config: the run.
      stored, raw: what the base's config.json says, translated and as written.
      start: the adapter it starts from.

    Raises:
      UserError: they differ.
    """
    known = start.labels if start else ()
    base = known or (names_in_config(raw) if stored.num_labels else ())
    given = config.label_names
    if given and base and given != base:
        raise UserError(
            f"label_names: {', '.join(given)}; but the head that is there tells apart "
            f"{', '.join(base)}; remove label_names."
        )
    return given or base


def labels_of_config(config: Config) -> Labels | None:
    """Returns the labels of a run whose model is not opened; None without any.

    Raises:
      UserError: as the run.
    """
    if not any(entry.type == "classification" for entry in config.datasets):
        return None
    described = config.base_model_config or config.base_model
    stored, raw = read_model_config(hub.resolve(described, config.revision_of_model))
    names = declared_names(config, stored, raw, None)
    return labels_of_run(config, wanted_labels(config, stored, raw), names)


def labels_of_run(config: Config, count: int, names: Sequence[str]) -> Labels | None:
    """Returns the labels of a run, names from the training data included; None without any.

    Raises:
      UserError: as `jaxlora.data.labels.labels_of`.
    """
    return labels_of(settings.train_specs(config), count, names) if count else None


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How often each label was taken for which.

    Attributes:
      counts: ``[label, predicted]``, texts.
      names: of the labels.
    """

    counts: np.ndarray
    names: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of the texts whose label is the most likely one.

        >>> Confusion(np.array([[3, 1], [0, 4]]), ("ham", "spam")).accuracy
        0.875
        """
        return float(np.trace(self.counts) / max(self.counts.sum(), 1))

    @property
    def majority(self) -> float:
        """Accuracy of always saying the most frequent label."""
        return float(self.counts.sum(axis=1).max() / max(self.counts.sum(), 1))

    def table(self) -> str:
        """Returns a line for each label (the most frequent ones): how many were found."""
        texts, found = self.counts.sum(axis=1), np.diag(self.counts)
        order = np.argsort(-texts, kind="stable")
        shown, others = sorted(order[:_SHOWN].tolist()), order[_SHOWN:]
        lines = [f"  {self.names[i]}: {found[i]:.0f} of {texts[i]:.0f}" for i in shown]
        if len(others):
            lines.append(
                f"  {len(others)} rarer labels: {found[others].sum():.0f} of "
                f"{texts[others].sum():.0f}"
            )
        return "\n".join(lines)
