"""A base model as a run or an adapter wants it: room for new tokens, a head of its own."""

import dataclasses
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlora.checkpoints.label_head import optional_leaves
from jaxlora.checkpoints.load import load_params, to_device
from jaxlora.checkpoints.matrices import QuantSpec, Split, is_table, stored_table
from jaxlora.checkpoints.regions import Region
from jaxlora.core.axes import VOCAB
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.parts import (
    Parts,
    token_rows,
    vocabulary_leaves,
    vocabulary_tables,
    whole_modules,
)
from jaxlora.lora.targets import selects
from jaxlora.models.config import ModelConfig
from jaxlora.models.families.labelled import labelled
from jaxlora.models.parameters import ParamSpec, describe

_TABLE = "embed/embedding"


def fit(
    cfg: ModelConfig,
    config: LoraConfig | None,
    vocab_size: int | None = None,
    num_labels: int = 0,
) -> ModelConfig:
    """Returns the shape of the model that an adapter is trained on, given the base's own.

    A head that shares the embedding's numbers gets its own where an adapter or `modules_to_save`
    changes only one of the two, as in PEFT: its wrappers leave the shared table to the other.
    Trained rows (`trainable_token_indices`) stay shared unless the head is given others.

    Args:
      cfg: the base.
      config: options of the adapter, None in full fine-tuning.
      vocab_size: number of tokens if not the base's.
      num_labels: labels of the classifier to make of a base that is none.

    Raises:
      UserError: the base cannot be made a classifier.
    """
    cfg = dataclasses.replace(cfg, vocab_size=vocab_size or cfg.vocab_size)
    if num_labels and not cfg.num_labels:
        cfg = labelled(cfg, num_labels)
    if not cfg.tie_embedding or config is None:
        return cfg
    untied = dataclasses.replace(cfg, tie_embedding=False)
    tables = vocabulary_tables(describe(untied)).values()
    own = any(selects(config, spec.modules()[0]) for spec in tables)
    return untied if own or _shared_ids(config) is None else cfg


def _shared_ids(config: LoraConfig) -> tuple[int, ...] | None:
    """Tokens whose rows train in embedding and head alike; None if the two differ."""
    tokens = config.trainable_token_indices
    if not isinstance(tokens, Mapping):
        return tokens
    if not tokens:
        return ()
    ids = list(tokens.values())
    alike = len(ids) == 2 and sorted(ids[0]) == sorted(ids[1])
    embedding_only = len(ids) == 1 and not next(iter(tokens)).endswith("lm_head")
    return ids[0] if alike or embedding_only else None


def adapter_parts(cfg: ModelConfig, config: LoraConfig) -> Parts:
    """Returns what trains beside the low-rank pairs of an adapter.

    Args:
      cfg: from `fit`.
      config: options of the adapter.

    Raises:
      UserError: names or tokens that the model does not have, or a table claimed twice.
    """
    specs = describe(cfg)
    parts = whole_modules(specs, config.modules_to_save)
    tokens = config.trainable_token_indices
    if not tokens:
        return parts
    shared = _shared_ids(config)
    rows = token_rows(specs, shared if cfg.tie_embedding and shared else tokens)
    for path in rows:
        name = specs[path].modules()[0].rpartition(".")[2]
        if path in parts:
            raise UserError(
                f"lora_modules_to_save: {name} trains whole, so peft_trainable_token_indices has "
                "nothing to add to it; remove one of them."
            )
        if selects(config, specs[path].modules()[0]):
            raise UserError(
                f"lora_target_modules: {name} cannot have an adapter and rows of "
                "peft_trainable_token_indices; remove one of them."
            )
    return parts | rows


def load_base(
    folder: Path,
    stored: ModelConfig,
    cfg: ModelConfig,
    *,
    dtype: DTypeLike,
    quantization: QuantSpec | None = None,
    place: Callable[[str, Any], Any] = to_device,
    split: Split | None = None,
    progress: Callable[[int, int], None] | None = None,
    trained: Collection[str] = (),
    mean_resizing: bool = False,
    seed: int = 0,
    only: Collection[str] | None = None,
    needed: Callable[[str], Region | None] | None = None,
) -> Tree:
    """Returns the parameter tree of `cfg` from a folder that holds `stored`.

    Args:
      folder, dtype, quantization, place, split, progress: as in `load_params`.
      stored: shape of the model in the folder.
      cfg: shape wanted, from `fit`.
      trained: paths read in float32 and never quantized.
      mean_resizing: new rows are the mean of the old ones (transformers draws them from a normal
        distribution around it, of a billionth of the old rows' covariance); else they are random,
        the same each time, as the model's fresh weights are.
      seed: of the head of labels that the base lacks.
      only: paths to read, of the stored model; None: all.
      needed: as in `load_params`.

    Raises:
      UserError: as `load_params`; a table that must grow and is quantized in the files; no head of
        labels in the folder, and none among `trained`.
    """
    specs, optional = describe(cfg), optional_leaves(stored, cfg)
    stored = labelled(stored, cfg.num_labels) if optional else stored
    head: dict[str, Any] = {}
    own_head, late = _stored_late(describe(stored), specs, stored.tie_embedding, quantization)

    def fitted(path: str, leaf: Any) -> Any:
        # As in transformers, which only appends zeros to the bias of a tied head.
        mean = mean_resizing and not (stored.tie_embedding and specs[path].kind == "bias")
        leaf = _resized(path, leaf, specs[path], None if mean else cfg.init_std)
        for other in own_head if path == _TABLE else ():
            head[other] = place(other, stored_as(other, np.ascontiguousarray(leaf.T)))
        return place(path, stored_as(path, leaf) if path in late else leaf)

    def stored_as(path: str, leaf: Any) -> Any:
        return leaf if path in trained else _stored(leaf, specs[path], dtype, quantization)

    params = load_params(
        folder,
        stored,
        dtype=dtype,
        quantization=quantization,
        place=fitted,
        split=split,
        progress=progress,
        trained={*trained, *late},
        only=only,
        optional=optional,
        needed=needed and _of_unchanged(needed, describe(stored), specs, late),
    )
    leaves = {**flatten(params), **head}
    for path in sorted(optional - leaves.keys()) if only is None else ():
        leaves[path] = place(path, _fresh(folder, specs[path], path, trained, seed))
    return unflatten(leaves)


def _stored_late(
    stored: Mapping[str, ParamSpec],
    specs: Mapping[str, ParamSpec],
    tied: bool,
    quantization: QuantSpec | None,
) -> tuple[list[str], set[str]]:
    """The leaves of a head that gets numbers of its own, and the tables that are read plain because
    they are copied, or grow before they are quantized."""
    own_head = [path for path in specs if tied and path not in stored]
    late = {_TABLE} if own_head else set()
    if quantization is not None and quantization.embeddings is not None:
        late |= {path for path, spec in stored.items() if is_table(spec) and spec != specs[path]}
    return own_head, late


def _stored(
    table: np.ndarray, spec: ParamSpec, dtype: DTypeLike, quantization: QuantSpec | None
) -> Any:
    """A table that was read plain, as the run stores it."""
    if quantization is not None and quantization.embeddings is not None:
        return stored_table(table, spec)
    return table.astype(jnp.dtype(dtype))


def _of_unchanged(
    needed: Callable[[str], Region | None],
    stored: Mapping[str, ParamSpec],
    specs: Mapping[str, ParamSpec],
    copied: Collection[str],
) -> Callable[[str], Region | None]:
    """`needed` of leaves that stay as they are; a table is resized, or copied, as a whole."""

    def of(path: str) -> Region | None:
        changed = path in copied or stored[path].shape != specs[path].shape
        return None if changed else needed(path)

    return of


def _fresh(
    folder: Path, spec: ParamSpec, path: str, trained: Collection[str], seed: int
) -> np.ndarray:
    """A part of the head as transformers starts it: normal, without a bias."""
    if path not in trained:
        raise UserError(
            f"{folder}: holds no {spec.hf_names[0]}, a part of the head of labels; expected the "
            "classifier, or an adapter that brings it along."
        )
    if isinstance(spec.init, str):
        return np.full(spec.full_shape, float(spec.init == "ones"), np.float32)
    rng = np.random.default_rng([seed, *path.encode()])
    return rng.normal(0.0, spec.init, spec.full_shape).astype(np.float32)


def resized_tables(
    folder: Path, stored: ModelConfig, cfg: ModelConfig, *, mean_resizing: bool
) -> dict[str, np.ndarray]:
    """Returns the leaves of the vocabulary as `load_base` makes them for `cfg`, float32.

    Args:
      folder, stored, cfg, mean_resizing: as there.

    Raises:
      UserError: as there.
    """
    params = load_base(
        folder,
        stored,
        cfg,
        dtype=jnp.float32,
        place=lambda path, leaf: leaf,
        trained=vocabulary_leaves(describe(cfg)),
        mean_resizing=mean_resizing,
        only=vocabulary_leaves(describe(stored)),
    )
    return flatten(params)


def _resized(path: str, leaf: Any, spec: ParamSpec, deviation: float | None) -> Any:
    """`leaf` with rows for new tokens, at the mean of the others or random of that deviation."""
    if VOCAB not in spec.axes or leaf.shape == spec.full_shape:
        return leaf
    if not isinstance(leaf, np.ndarray):
        raise UserError(
            f"tokens: {spec.hf_names[0]} is quantized in the files of the base and cannot grow; "
            "name its module in lora_modules_to_save, or give the unquantized model."
        )
    axis = spec.axes.index(VOCAB)
    new = spec.shape[axis] - leaf.shape[axis]
    old = leaf if axis == 0 else leaf.T
    if deviation is None:
        rows = np.repeat(old.mean(axis=0, dtype=np.float64, keepdims=True), new, axis=0)
    elif old.ndim == 1:
        rows = np.zeros(new)
    else:  # each table its own numbers
        generator = np.random.default_rng(zlib.crc32(path.encode()))
        rows = generator.normal(0.0, deviation, (new, *old.shape[1:]))
    return np.concatenate([leaf, (rows if axis == 0 else rows.T).astype(leaf.dtype)], axis=axis)


def written_config(raw: Mapping[str, Any], stored: ModelConfig, cfg: ModelConfig) -> dict[str, Any]:
    """Returns config.json of a fitted model, given that of the base.

    >>> # a head of its own, three more tokens
    >>> stored = ModelConfig(8, 4, 8, 2, 2, 1, 2, 16, 1e-5, 1e4, tie_embedding=True)
    >>> written_config({}, stored, dataclasses.replace(stored, vocab_size=11, tie_embedding=False))
    {'vocab_size': 11, 'tie_word_embeddings': False}
    """
    changes: dict[str, Any] = {}
    if cfg.vocab_size != stored.vocab_size:
        changes["vocab_size"] = cfg.vocab_size
    if cfg.tie_embedding != stored.tie_embedding:
        changes["tie_word_embeddings"] = cfg.tie_embedding
    return {**raw, **changes}
