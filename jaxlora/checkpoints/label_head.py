"""A head of labels in files: what of it an adapter brings along, and what its labels are called."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxlora.checkpoints.peft_tensors import PREFIX
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import CLASSIFIERS
from jaxlora.models.families.labelled import labelled
from jaxlora.models.head import head_leaves
from jaxlora.models.parameters import describe

# In the metadata of an adapter's safetensors file, which PEFT does not read.
_LABELS = "jaxlora_labels"


def default_names(count: int) -> tuple[str, ...]:
    """Returns what transformers calls labels without a name.

    >>> default_names(2)
    ('LABEL_0', 'LABEL_1')
    """
    return tuple(f"LABEL_{number}" for number in range(count))


def names_in_config(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the labels that config.json of a classifier names; none if only by number.

    >>> names_in_config({"id2label": {"1": "spam", "0": "ham"}})
    ('ham', 'spam')
    """
    written = raw.get("id2label") or {}
    names = tuple(str(written[number]) for number in sorted(written, key=int))
    return () if names == default_names(len(names)) else names


def label_config(
    raw: Mapping[str, Any], cfg: ModelConfig, names: Sequence[str], pad_id: int
) -> dict[str, Any]:
    """Returns config.json of a classifier, given that of its base.

    Args:
      raw: the base's.
      cfg: the classifier.
      names: of the labels, or none.
      pad_id: of the tokenizer; transformers finds the last token of a text by it.
    """
    names = tuple(names) or names_in_config(raw) or default_names(cfg.num_labels)
    kept = {key: value for key, value in raw.items() if key != "num_labels"}
    # An encoder reads its first token, and RoBERTa counts positions from the padding token.
    if cfg.pooling == "last" or kept.get("pad_token_id") is None:
        kept["pad_token_id"] = pad_id
    return {
        **kept,
        "architectures": [cfg.family],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def with_head(config: LoraConfig, cfg: ModelConfig, fresh: Collection[str]) -> LoraConfig:
    """Returns the options of an adapter that trains the head of labels, if any, whole.

    PEFT adds modules named `classifier` or `score` to `modules_to_save` by itself; what else
    the base lacks (BERT's pooler) would stay random there, so it is named too.

    Args:
      config: the user's options.
      cfg: the classifier.
      fresh: paths of the leaves that the base lacks.
    """
    if not cfg.num_labels:
        return config
    specs = describe(cfg)
    top = specs["classifier/kernel"].modules()[0].split(".")[0]
    others = {specs[path].modules()[0] for path in fresh}
    beyond = {name for name in others if name.split(".")[0] != top}
    return dataclasses.replace(
        config, modules_to_save=tuple(sorted({*config.modules_to_save, top, *beyond}))
    )


def with_labels_of(files: Tensors, stored: ModelConfig) -> ModelConfig:
    """Returns the shape of the classifier that an adapter is for, of the base itself if it has no
    head of labels.

    Args:
      files: the adapter's.
      stored: the base.
    """
    if stored.num_labels or stored.family not in CLASSIFIERS:
        return stored
    head = describe(labelled(stored, 2))["classifier/kernel"].modules()[0]
    info = files.info.get(f"{PREFIX}{head}.weight")
    return stored if info is None else labelled(stored, info.shape[0])


def labels_metadata(names: Sequence[str]) -> dict[str, str]:
    """Returns the record of the labels' names, in the words of safetensors' metadata."""
    return {_LABELS: json.dumps(list(names))} if names else {}


def labels_in_metadata(files: Tensors) -> tuple[str, ...]:
    """Returns the names that `labels_metadata` recorded.

    Raises:
      UserError: a record that cannot be read.
    """
    written = files.metadata.get(_LABELS, "[]")
    try:
        return tuple(map(str, json.loads(written)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{files.folder}: {_LABELS} in the metadata of its safetensors file is {written!r} "
            f"({error}); export the adapter again."
        ) from error


def optional_leaves(stored: ModelConfig, cfg: ModelConfig) -> frozenset[str]:
    """Returns the leaves of `cfg` that a folder holding `stored` may lack."""
    return head_leaves(describe(cfg)) if cfg.num_labels and not stored.num_labels else frozenset()
