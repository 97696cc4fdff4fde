"""What an adapter file holds beside low-rank pairs: whole modules, rows of tokens, base tables."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlora.checkpoints.peft_tensors import PREFIX
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.core.errors import UserError
from jaxlora.lora.parts import Part
from jaxlora.lora.targets import Target
from jaxlora.models.parameters import ParamSpec

_ROWS = ".token_adapter.trainable_tokens_delta"
# Where PEFT keeps the table of an embedding or head, depending on what is wrapped around it.
_TABLE_SUFFIXES = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
# Copies that PEFT writes of a resized table in modules_to_save.
_COPIES = (".original_module.weight", ".modules_to_save.weight")

Entry = tuple[str, int | None, str, tuple[int, ...]]


def trained_entries(specs: Mapping[str, ParamSpec], parts: Mapping[str, Part]) -> Iterator[Entry]:
    """``(leaf path, position in the trained array, PEFT's key, shape)`` of every tensor."""
    for path, part in sorted(parts.items()):
        spec = specs[path]
        if part.by_token:
            shape = part.shape(spec.shape)
            yield path, None, f"{PREFIX}{spec.modules()[0]}{_ROWS}", _turned(spec, shape)
            continue
        modules, leaf = spec.modules(), spec.hf_names[0].rpartition(".")[2]
        for number, layer in enumerate(part.layers or range(len(modules))):
            key = f"{PREFIX}{modules[layer]}.{leaf}"
            yield path, number if part.stacked else None, key, spec.tensor_shape


def trained_tensors(
    specs: Mapping[str, ParamSpec], parts: Mapping[str, Part], params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns ``{PEFT's key: values}`` of what trains with all its numbers.

    Args:
      specs: every parameter.
      parts: what trains of each.
      params: the trained arrays.
    """
    tensors = {}
    for path, number, key, _ in trained_entries(specs, parts):
        values = np.asarray(params[path] if number is None else params[path][number], np.float32)
        tensors[key] = np.ascontiguousarray(values.T if specs[path].transposed else values)
    return tensors


def read_trained(
    files: Tensors, specs: Mapping[str, ParamSpec], parts: Mapping[str, Part]
) -> dict[str, np.ndarray]:
    """Returns ``{leaf path: trained array}``, float32.

    Raises:
      UserError: a tensor is missing or misshapen.
    """
    params: dict[str, np.ndarray] = {}
    for path, number, key, shape in trained_entries(specs, parts):
        if key not in files.info:
            raise UserError(
                f"{files.folder}: {key} is missing, though adapter_config.json says that it was "
                "trained; export the adapter again."
            )
        _check_shape(files, key, shape)
        values = files.read(key).astype(np.float32)
        values = values.T if specs[path].transposed else values
        if number is None:
            params[path] = np.ascontiguousarray(values)
        else:
            whole = parts[path].shape(specs[path].full_shape)
            params.setdefault(path, np.empty(whole, np.float32))[number] = values
    return params


def _turned(spec: ParamSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if spec.transposed else shape


def _check_shape(files: Tensors, key: str, shape: tuple[int, ...]) -> None:
    found = files.info[key].shape
    if found != shape:
        raise UserError(
            f"{files.info[key].file}: {key} has shape {list(found)}; expected {list(shape)}: the "
            "adapter is for another base model."
        )


def table_tensors(
    specs: Mapping[str, ParamSpec],
    parts: Mapping[str, Part],
    targets: Mapping[str, Target],
    leaves: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Returns ``{PEFT's key: values}`` of resized tables that do not train whole.

    PEFT writes them with the adapter, for the base on disk lacks the new rows.

    Args:
      specs: every parameter.
      parts, targets: what trains.
      leaves: base leaves of the tables.
    """
    tensors = {}
    for path, leaf in leaves.items():
        spec, part = specs[path], parts.get(path)
        if part is not None and part.whole:
            continue
        suffix = _TABLE_SUFFIXES[2 if part is not None else 1 if path in targets else 0]
        values = np.asarray(leaf).astype(np.float32)
        key = f"{PREFIX}{spec.modules()[0]}{suffix}"
        tensors[key] = np.ascontiguousarray(values.T if spec.transposed else values)
    return tensors


def read_tables(
    files: Tensors, tables: Mapping[str, ParamSpec], parts: Mapping[str, Part]
) -> dict[str, np.ndarray]:
    """Returns ``{leaf path: table}`` of the base tables that an adapter brings along.

    Raises:
      UserError: one is misshapen.
    """
    found = {}
    for path, spec in tables.items():
        part = parts.get(path)
        if part is not None and part.whole:
            continue
        for key in _table_keys(spec):
            if key in files.info:
                _check_shape(files, key, _turned(spec, spec.shape))
                values = files.read(key)
                found[path] = np.ascontiguousarray(values.T if spec.transposed else values)
    return found


def table_keys(spec: ParamSpec) -> set[str]:
    """Returns every key under which PEFT may have written a table, copies included."""
    return {*_table_keys(spec), *(f"{PREFIX}{spec.modules()[0]}{copy}" for copy in _COPIES)}


def _table_keys(spec: ParamSpec) -> list[str]:
    return [f"{PREFIX}{spec.modules()[0]}{suffix}" for suffix in _TABLE_SUFFIXES]


def vocabulary(files: Tensors, embedding: ParamSpec) -> int | None:
    """Returns how many tokens the embedding of an adapter's base has, None if it does not tell."""
    for key in _table_keys(embedding):
        if key in files.info:
            return files.info[key].shape[0]
    low_rank = f"{PREFIX}{embedding.modules()[0]}.lora_embedding_A"
    return files.info[low_rank].shape[1] if low_rank in files.info else None
