"""A PEFT adapter with everything it trains: low-rank pairs, whole modules, rows of tokens."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlora import lora
from jaxlora.checkpoints.adapter_files import open_adapter
from jaxlora.checkpoints.fitted import adapter_parts, fit
from jaxlora.checkpoints.label_head import labels_in_metadata, with_labels_of
from jaxlora.checkpoints.peft import load_adapter
from jaxlora.checkpoints.peft_config import CONFIG_FILE
from jaxlora.checkpoints.whole import (
    read_tables,
    read_trained,
    table_keys,
    table_tensors,
    trained_entries,
    trained_tensors,
    vocabulary,
)
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.parts import Part, Parts, fill, vocabulary_leaves, vocabulary_tables
from jaxlora.lora.targets import Target
from jaxlora.lora.transform import Adapter
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a folder, and the base it is for.

    Attributes:
      cfg: shape of the base as the adapter wants it (`jaxlora.checkpoints.fitted`).
      config: its options.
      pairs, targets: its low-rank pairs.
      params, parts: what it trained with all its numbers, ``{leaf path: array}``, float32.
      tables: base leaves that it brings along, for new tokens, float32.
      labels: what its labels are called, if it is a classifier's and tells.
    """

    cfg: ModelConfig
    config: LoraConfig
    pairs: Adapter
    targets: dict[str, Target]
    params: dict[str, np.ndarray]
    parts: Parts
    tables: dict[str, np.ndarray]
    labels: tuple[str, ...] = ()

    def on(self, params: Mapping[str, Any], dtype: DTypeLike | None = None) -> Tree:
        """Returns base weights with the adapter in place.

        Args:
          params: from `load_base` with `cfg` (and `trained=parts` if it quantizes).
          dtype: of whole modules; None keeps them float32.
        """
        leaves = flatten(params)
        for path, table in self.tables.items():
            leaves[path] = jnp.asarray(table, leaves[path].dtype)
        for path, part in self.parts.items():
            value = jnp.asarray(self.params[path], dtype)
            leaves[path] = fill(None if part.whole else part.hole(leaves[path]), value)
        return lora.apply(unflatten(leaves), self.pairs, self.targets)


def tensors_beside(
    cfg: ModelConfig,
    stored: ModelConfig,
    targets: Mapping[str, Target],
    parts: Parts,
    params: Mapping[str, Any],
    tables: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Returns ``{PEFT's key: values}`` of all in an adapter file that is no low-rank pair.

    Args:
      cfg: shape of the base as the adapter wants it.
      stored: shape of the base on disk.
      targets: of the low-rank pairs.
      parts, params: what trained with all its numbers.
      tables: base leaves of the vocabulary, which the file needs if the base on disk lacks rows.
    """
    specs = describe(cfg)
    tensors = trained_tensors(specs, parts, params)
    if cfg.vocab_size == stored.vocab_size:
        return tensors
    return tensors | table_tensors(specs, parts, targets, tables)


def read_adapter(
    folder: Path, stored: ModelConfig, *, fingerprint: str | None = None
) -> LoadedAdapter:
    """Reads all of an adapter made by PEFT, us, mlx-lm or torchtune.

    Args:
      folder: holds adapter_config.json and the weights.
      stored: shape of the base model on disk.
      fingerprint: as for `load_adapter`.

    Raises:
      UserError: as `load_adapter`; an adapter for fewer tokens than the base has.
    """
    folder = Path(folder)
    opened = open_adapter(folder)
    config, files = opened.config, opened.tensors
    stored = with_labels_of(files, stored)
    tokens = vocabulary(files, describe(stored)["embed/embedding"])
    if tokens is not None and tokens < stored.vocab_size:
        raise UserError(
            f"{folder}: the adapter is for {tokens} tokens and the base model has "
            f"{stored.vocab_size}; expected the base it was trained on."
        )
    config = _fitting(config, stored)
    cfg = fit(stored, config, tokens)
    if opened.content.get("ensure_weight_tying") and cfg.tie_embedding != stored.tie_embedding:
        raise UserError(
            f"{folder / CONFIG_FILE}: ensure_weight_tying: true is not supported; expected false: "
            "embedding and head are trained apart."
        )
    specs = describe(cfg)
    parts = _parts(folder, cfg, config)
    params = read_trained(files, specs, parts)
    for path in (path for path, part in parts.items() if part.by_token):
        order = np.argsort(_token_ids(config, specs[path].modules()[0]))
        params[path] = np.take(params[path], order, parts[path].axis)
    tables = read_tables(files, vocabulary_leaves(specs), parts)
    if cfg.vocab_size != stored.vocab_size:
        tables = _complete(tables, folder, stored, cfg, parts)
    beside = {key for _, _, key, _ in trained_entries(specs, parts)}
    # The head of a tied model is the embedding again, wrapped or not.
    for spec in vocabulary_leaves(describe(dataclasses.replace(cfg, tie_embedding=False))).values():
        beside |= table_keys(spec)
        if spec.kind == "head" and cfg.tie_embedding:
            beside |= {key for key in files.info if f".{spec.modules()[0]}.token_adapter." in key}
    pairs, targets, config = load_adapter(
        folder, specs, fingerprint=fingerprint, head_dim=cfg.head_dim, beside=beside
    )
    labels = labels_in_metadata(files)
    return LoadedAdapter(cfg, config, pairs, targets, params, parts, tables, labels)


def _complete(
    tables: dict[str, np.ndarray], folder: Path, stored: ModelConfig, cfg: ModelConfig, parts: Parts
) -> dict[str, np.ndarray]:
    """`tables` and the head of a tied base, which the file holds as its embedding only."""
    for path, spec in vocabulary_tables(describe(cfg)).items():
        if path in tables or (path in parts and parts[path].whole):
            continue
        if not stored.tie_embedding or "embed/embedding" not in tables:
            raise UserError(
                f"{folder}: the adapter is for {cfg.vocab_size} tokens, its base has "
                f"{stored.vocab_size}, and the file lacks the new rows of {spec.modules()[0]}; "
                "give a base model that has them."
            )
        tables = {**tables, path: np.ascontiguousarray(tables["embed/embedding"].T)}
    return tables


def _parts(folder: Path, cfg: ModelConfig, config: LoraConfig) -> dict[str, Part]:
    try:
        return adapter_parts(cfg, config)
    except UserError as error:
        raise UserError(
            f"{folder / CONFIG_FILE}: the adapter does not fit this base model: {error}"
        ) from error


def _token_ids(config: LoraConfig, module: str) -> tuple[int, ...]:
    """The tokens of a table in the order of the file."""
    tokens = config.trainable_token_indices
    if not isinstance(tokens, Mapping):
        return tokens
    named = [ids for name, ids in tokens.items() if module.endswith(name)]
    return named[-1] if named else next(iter(tokens.values()))


def _fitting(config: LoraConfig, stored: ModelConfig) -> LoraConfig:
    """`config` less the whole modules this model lacks, which PEFT lets pass."""
    untied = describe(dataclasses.replace(stored, tie_embedding=False))
    parents = [f"{module}." for spec in untied.values() for module in spec.modules()]
    kept = tuple(name for name in config.modules_to_save if any(f"{name}." in m for m in parents))
    return dataclasses.replace(config, modules_to_save=kept)
