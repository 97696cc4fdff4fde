"""Adapters out to PEFT's folder layout and back, bit for bit."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.adapter_files import open_adapter
from jaxlora.checkpoints.atomic import staged
from jaxlora.checkpoints.label_head import labels_metadata
from jaxlora.checkpoints.load import QuantSpec
from jaxlora.checkpoints.peft_base import (
    bias_modules,
    expert_names,
    has_fan_in,
    refuse_unloadable,
)
from jaxlora.checkpoints.peft_config import CONFIG_FILE, write_config
from jaxlora.checkpoints.peft_records import FINGERPRINT, records
from jaxlora.checkpoints.peft_tensors import PREFIX, entries, put, to_peft
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.write import write_tensors
from jaxlora.core.errors import UserError
from jaxlora.lora.biases import with_biases
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.targets import Target
from jaxlora.lora.transform import Adapter
from jaxlora.models.parameters import ParamSpec
from jaxlora.models.targets import (
    adaptable_modules,
    adaptable_parameters,
    targets_of_specs,
    weights_as_modules,
)

# Tensors of PEFT features that jaxlora does not have, and their names.
_UNSUPPORTED = {
    "lora_embedding_": "an adapter on an embedding",
    ".base_layer.": "weights of the base (bias: all or lora_only)",
    "token_adapter": "trainable_token_indices",
    "lora_": "an adapter",
}


def save_adapter(
    folder: Path,
    adapter: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, Target],
    config: LoraConfig,
    *,
    base_name: str,
    revision: str | None = None,
    fingerprint: str | None = None,
    storage: QuantSpec | None = None,
    split: str | None = None,
    specs: Mapping[str, ParamSpec] | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (float32), both whole or not at all.

    Args:
      folder: made if need be; other files in it stay.
      adapter: the trained arrays.
      targets: the targets it was made for.
      config: the options the targets were made from.
      base_name: folder or hub id of the base model, for readers.
      revision: its revision on the hub.
      fingerprint: `base_fingerprint` of the base; `load_adapter` refuses other bases by it.
      storage: how the base was quantized in training; `trained_storage` reads it.
      split: initializer by which the adapter started as a part of a base that was quantized then.
      specs: `describe` of the base, from which the file says which modules are meant, and how
        they hold their weights; may be left out for a LLaMA.
      beside: tensors beside the low-rank pairs, by PEFT's key (`jaxlora.checkpoints.whole`).
      labels: what a classifier's labels are called; `read_adapter` reads them.

    Raises:
      UserError: a value is not finite, the folder cannot be written, or PEFT could not load it.
    """
    refuse_unloadable(specs or {}, targets, config)
    leaves = {path: {k: np.asarray(x) for k, x in pair.items()} for path, pair in adapter.items()}
    tensors = {
        key: to_peft(leaves[path][part], targets[path], layer, part)
        for path, part, layer, key in entries(targets)
    } | dict(beside or {})
    for key, values in tensors.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"{key}: has values that are not finite (training diverged); the adapter was not "
                "written. Lower learning_rate or resume from an earlier checkpoint."
            )
    metadata = {"format": "pt", **labels_metadata(labels)}
    metadata |= records(fingerprint=fingerprint, storage=storage, split=split)
    with staged(Path(folder)) as stage:
        write_tensors(
            stage / "adapter_model.safetensors",
            {key: values.shape for key, values in tensors.items()},
            tensors.__getitem__,
            dtype=np.dtype(np.float32),
            metadata=metadata,
        )
        write_config(
            stage / CONFIG_FILE,
            targets,
            config,
            base_name=base_name,
            revision=revision,
            fan_in_fan_out=specs is not None and has_fan_in(specs, targets),
            base_modules={n for each in adaptable_modules(specs or {}).values() for n in each},
            expert_names=expert_names(specs or {}),
        )


def load_adapter(
    folder: Path,
    specs: Mapping[str, ParamSpec],
    *,
    fingerprint: str | None = None,
    head_dim: int | None = None,
    beside: Collection[str] = (),
) -> tuple[Adapter, dict[str, Target], LoraConfig]:
    """Returns ``(adapter, targets, config)`` of an adapter made by PEFT, us, mlx-lm or torchtune.

    Args:
      folder: holds adapter_config.json and the weights.
      specs: `jaxlora.models.parameters.describe` of the base model.
      fingerprint: `base_fingerprint` of the base. An adapter that records another one is refused;
        adapters from elsewhere record none.
      head_dim: size of the base's attention heads; torchtune's own layout needs it.
      beside: keys of the tensors that belong to something else than low-rank pairs.

    Raises:
      UserError: missing, extra or misshapen tensors, another base, an unsupported feature.
    """
    folder = Path(folder)
    opened = open_adapter(folder, specs=specs, head_dim=head_dim)
    config, files = opened.config, opened.tensors
    recorded = files.metadata.get(FINGERPRINT)
    if fingerprint and recorded and recorded != fingerprint:
        raise UserError(
            f"{folder}: this adapter was trained on another base model of the same shape; expected "
            "the base named in its adapter_config.json (base_model_name_or_path)."
        )
    targets = _match(folder, files, specs, config)
    _check(opened.file, files, specs, targets, beside)
    adapter = {}
    for path, part, layer, key in entries(targets):
        target = targets[path]
        leaf = adapter.setdefault(path, _zeros(specs[path], target))[part]
        values = files.read(key).astype(np.float32)
        where = leaf[layer] if target.stacked else leaf
        put(where, values, part, target.ranks[layer])
    adapter = {path: {k: jnp.asarray(x) for k, x in pair.items()} for path, pair in adapter.items()}
    return adapter, targets, config


def _match(
    folder: Path, files: Tensors, specs: Mapping[str, ParamSpec], config: LoraConfig
) -> dict[str, Target]:
    modules, parameters = (
        [name for names in each.values() for name in names]
        for each in (adaptable_modules(specs), adaptable_parameters(specs))
    )
    config = weights_as_modules(config, modules)
    in_file = [key.partition(".lora_")[0].removeprefix(PREFIX) for key in files.info]
    try:
        targets = targets_of_specs(specs, _relevant(config, modules, parameters, in_file))
        stacked = [path for path, spec in specs.items() if spec.layers is not None]
        return with_biases(targets, bias_modules(specs), config.train_bias, stacked)
    except (UserError, re.error) as error:
        raise UserError(
            f"{folder / CONFIG_FILE}: the adapter does not fit this base model: {error}"
        ) from error


def _relevant(
    config: LoraConfig, known: list[str], parameters: list[str], in_file: list[str]
) -> LoraConfig:
    """`config` less the rules that match nothing in this model, which PEFT lets pass.

    One list of rules serves many models there. Nothing gets lost by it: the tensors in the file
    must be exactly those of the modules that remain.
    """

    def fitting(rules: tuple[str, ...] | str, modules: list[str]) -> tuple[str, ...] | str:
        if isinstance(rules, str):
            return rules
        return tuple(r for r in rules if any(f".{m}".endswith(f".{r}") for m in modules))

    def fitting_patterns(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {
            pattern: value
            for pattern, value in patterns.items()
            if any(re.match(rf"^(.*\.)?({pattern})$", path) for path in known + parameters)
        }

    return dataclasses.replace(
        config,
        target_modules=fitting(config.target_modules, known + in_file),
        target_parameters=fitting(config.target_parameters, parameters),
        exclude_modules=fitting(config.exclude_modules, known),
        rank_pattern=fitting_patterns(config.rank_pattern),
        alpha_pattern=fitting_patterns(config.alpha_pattern),
    )


def _zeros(spec: ParamSpec, target: Target) -> dict[str, np.ndarray]:
    if target.vector:
        return {"value": np.zeros(spec.full_shape, np.float32)}
    *lead, in_dim, out_dim = spec.full_shape
    shapes: dict[str, tuple[int, ...]] = {
        "a": (*lead, in_dim, target.rank),
        "b": (*lead, target.rank, out_dim),
    }
    if target.dora:
        shapes["magnitude"] = (*lead, out_dim)
    if target.bias:
        shapes["bias"] = (*lead, out_dim)
    return {part: np.zeros(shape, np.float32) for part, shape in shapes.items()}


def _check(
    where: Path,
    files: Tensors,
    specs: Mapping[str, ParamSpec],
    targets: Mapping[str, Target],
    beside: Collection[str],
) -> None:
    """Compares names and shapes before anything is read; PEFT itself would only warn."""
    expected = {}
    for path, part, layer, key in entries(targets):
        *lead, in_dim, out_dim = (1, *specs[path].shape)
        rank = targets[path].ranks[layer] * math.prod(lead)
        expected[key] = {"a": (rank, in_dim), "b": (out_dim, rank)}.get(part, (out_dim,))
    extra = [key for key in files.info if key not in expected and key not in beside]
    if extra:
        named = [text for sign, text in _UNSUPPORTED.items() if sign in extra[0]]
        what = named[0] if named else "weights of whole modules (modules_to_save)"
        raise UserError(
            f"{where}: {extra[0]} ({len(extra)} such tensors) has no place: {what} that this base "
            "model or adapter_config.json does not allow for."
        )
    missing = [key for key in expected if key not in files.info]
    if missing:
        raise UserError(
            f"{where}: {missing[0]} is missing ({len(missing)} tensors in all), though "
            "adapter_config.json selects its module; export the adapter again."
        )
    for key, shape in expected.items():
        found = files.info[key].shape
        if found != shape:
            raise UserError(
                f"{where}: {key} has shape {list(found)}; expected {list(shape)}: the adapter is "
                "for another base model, or its config for another rank."
            )
