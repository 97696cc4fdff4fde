"""What an adapter file holds beside low-rank pairs: whole modules, rows of tokens, base tables."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlora.checkpoints.peft_tensors import PREFIX
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.tensors import TensorInfo
from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.parts import Part
from jaxlora.lora.targets import Target
from jaxlora.models.parameters import ParamSpec

_ROWS = ".token_adapter.trainable_tokens_delta"
# Where PEFT keeps an embedding or head, depending on what is wrapped around it.
_PLAIN, _PAIR, _BY_ROW = "", ".base_layer", ".token_adapter.base_layer"
# Copies that PEFT writes of a resized table in modules_to_save.
_COPIES = (".original_module", ".modules_to_save")

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
        if (part is not None and part.whole) or (path in targets and targets[path].vector):
            continue
        values = np.asarray(leaf).astype(np.float32)
        key = _table_key(spec, _wrapping(spec, specs, parts, targets))
        tensors[key] = np.ascontiguousarray(values.T if spec.transposed else values)
    return tensors


def _wrapping(
    spec: ParamSpec,
    specs: Mapping[str, ParamSpec],
    parts: Mapping[str, Part],
    targets: Mapping[str, Target],
) -> str:
    """What PEFT has put around the module of a table."""
    module = spec.modules()[0]
    own = {path for path, other in specs.items() if other.modules()[0] == module}
    if not any(specs[path].kind in ("embedding", "head") for path in own):
        # The head of a tied model, of which only the bias is left: wrapped like the embedding.
        own = {path for path in parts if specs[path].kind == "embedding"}
    if any(path in parts and parts[path].by_token for path in own):
        return _BY_ROW
    return _PAIR if any(path in targets and not targets[path].vector for path in own) else _PLAIN


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
                _check_shape(files, key, spec.tensor_shape)
                values = files.read(key)
                found[path] = np.ascontiguousarray(values.T if spec.transposed else values)
    return found


def table_keys(spec: ParamSpec) -> set[str]:
    """Returns every key under which PEFT may have written a table, copies included."""
    return {*_table_keys(spec), *(_table_key(spec, copy) for copy in _COPIES)}


def _table_keys(spec: ParamSpec) -> list[str]:
    return [_table_key(spec, wrapping) for wrapping in (_PLAIN, _PAIR, _BY_ROW)]


def _table_key(spec: ParamSpec, wrapping: str) -> str:
    # Not by the tensor's own name: a head's bias may lie elsewhere in the files of the base.
    leaf = "bias" if spec.kind == "bias" else "weight"
    return f"{PREFIX}{spec.modules()[0]}{wrapping}.{leaf}"


def base_tables(files: Tensors, config: LoraConfig) -> dict[str, TensorInfo]:
    """Returns the tensors of an adapter that were not trained: tables of its base, by key."""

    def trained(key: str) -> bool:
        module, _, leaf = key.rpartition(".")
        whole = any(module.endswith(name) for name in config.modules_to_save)
        bias = leaf == "bias" and config.train_bias != "none"
        return whole or bias or "lora_" in key or key.endswith(_ROWS)

    return {key: info for key, info in files.info.items() if not trained(key)}


def vocabulary(files: Tensors, embedding: ParamSpec) -> int | None:
    """Returns how many tokens the embedding of an adapter's base has, None if it does not tell."""
    for key in _table_keys(embedding):
        if key in files.info:
            return files.info[key].shape[0]
    low_rank = f"{PREFIX}{embedding.modules()[0]}.lora_embedding_A"
    return files.info[low_rank].shape[1] if low_rank in files.info else None
