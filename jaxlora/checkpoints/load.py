"""Hugging Face weights in: streamed tensor by tensor, quantized on the way, checked beforehand."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.checkpoints.tensors import FLOAT_DTYPES, TensorFiles
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, unflatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import read_config
from jaxlora.models.parameters import ParamSpec, describe
from jaxlora.ops.quantize import quantize

# Buffers that old transformers versions saved; they follow from config.json.
_INERT = ("rotary_emb.inv_freq", "self_attn.masked_bias")
_HEAD = "lm_head.weight"
_COMPARED_ROWS = 4096
_TILE = 128


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How the linear weights of a model are stored; see `jaxlora.ops.quantize.quantize`.

    Attributes:
      format: ``int4``, ``nf4`` or ``int8``.
      group_size: int4 only.
      double_quant: nf4 only.
    """

    format: str
    group_size: int = 64
    double_quant: bool = True


def read_model_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns what config.json says, translated, and its raw content.

    Raises:
      UserError: no config.json, bad JSON, an unsupported model, or prequantized weights.
    """
    path = Path(folder) / "config.json"
    raw = read_json_object(path, "expected a model folder in Hugging Face's layout")
    quantized = raw.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise UserError(
            f"{path}: quantization_config: weights already quantized ({method}) are not "
            "supported; give the unquantized model and set load_in_4bit: true."
        )
    try:
        return read_config(raw), raw
    except UserError as error:
        raise UserError(f"{path.parent}/{error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a field has a value of the wrong kind ({error}).") from error


def to_device(path: str, leaf: Any) -> Any:
    """Puts a host leaf on the default device; the default `place` of `load_params`."""
    return jax.tree.map(jnp.asarray, leaf)


def load_params(
    folder: Path,
    cfg: ModelConfig,
    *,
    dtype: DTypeLike,
    quantization: QuantSpec | None = None,
    place: Callable[[str, Any], Any] = to_device,
    progress: Callable[[int, int], None] | None = None,
) -> Tree:
    """Returns the parameter tree of a model folder.

    Host memory peaks at the leaves loaded so far plus one leaf and about two tensors. An int4 leaf
    takes a byte per element on the host: numpy has no packed four-bit type.

    Args:
      folder: holds config.json and the safetensors.
      cfg: from `read_model_config`.
      dtype: dtype of plain leaves, and the one quantized leaves stand for.
      quantization: how to store the linear weights; embedding, head, norms and biases stay plain.
      place: given a path and its complete host leaf, returns the leaf to keep, e.g. sharded.
      progress: called with elements read so far and in all, after every tensor.

    Raises:
      UserError: missing, leftover or misshapen tensors (found before any is read), damaged files.
    """
    files = TensorFiles(folder)
    specs = describe(cfg)
    names = {path: spec.hf_names() for path, spec in specs.items()}
    _check(files, specs, names, cfg)
    total, done = sum(spec.size for spec in specs.values()), 0
    leaves = {}
    for path, spec in specs.items():
        leaf = None
        for layer, name in enumerate(names[path]):
            part = _read(files, name, spec, jnp.dtype(dtype), quantization)
            if leaf is None:
                leaf = _empty(part, spec, jnp.dtype(dtype))
            at = ... if spec.layers is None else (layer, ...)
            jax.tree.map(lambda whole, piece, at=at: _copy(whole[at], piece), leaf, part)
            done += spec.size // len(names[path])
            if progress is not None:
                progress(done, total)
        leaves[path] = place(path, leaf)
    return unflatten(leaves)


def check_weights(folder: Path, cfg: ModelConfig) -> None:
    """Compares the weight files with the model they should hold; reads headers only.

    Raises:
      UserError: missing, leftover or misshapen tensors, damaged files.
    """
    specs = describe(cfg)
    names = {path: spec.hf_names() for path, spec in specs.items()}
    _check(TensorFiles(folder), specs, names, cfg)


def _read(
    files: TensorFiles, name: str, spec: ParamSpec, dtype: np.dtype, quantization: QuantSpec | None
) -> Any:
    """One layer's matrix ``[in, out]``, quantized if it is to be, else in the dtype of the file."""
    tensor = files.read(name)
    matrix = tensor.T if spec.transposed else tensor
    if quantization is None or spec.kind != "linear":
        return matrix
    options = dataclasses.asdict(quantization)
    try:
        return quantize(matrix, options.pop("format"), **options, dtype=dtype.name)
    except UserError as error:
        raise UserError(f"{files.info[name].file}: {name}: {error}") from error


def _empty(part: Any, spec: ParamSpec, dtype: np.dtype) -> Any:
    """Host buffers for a whole leaf of which `part` is one layer."""
    lead = () if spec.layers is None else (spec.layers,)
    if isinstance(part, np.ndarray):
        return np.empty(lead + part.shape, dtype)
    return jax.tree.map(lambda x: np.empty(lead + x.shape, x.dtype), part)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, by tiles: 4 times as fast where `source` is a transposed view."""
    if target.dtype == source.dtype:  # as words: numpy copies bfloat16 one element at a time
        word = f"u{target.dtype.itemsize}"
        target, source = target.view(word), source.view(word)
    if target.ndim < 2:
        target[...] = source
        return
    for row in range(0, target.shape[0], _TILE):
        for column in range(0, target.shape[1], _TILE):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            target[tile] = source[tile]


def _check(
    files: TensorFiles,
    specs: Mapping[str, ParamSpec],
    names: dict[str, list[str]],
    cfg: ModelConfig,
) -> None:
    """Compares names, shapes and dtypes with the model, and settles tied heads, before reading."""
    if cfg.tie_embedding and _HEAD in files.info:
        _settle_tied_head(files, names, specs["embed/embedding"].hf_name)
    expected = {
        name: (spec.shape[::-1] if spec.transposed else spec.shape)
        for path, spec in specs.items()
        for name in names[path]
    }
    missing = [name for name in expected if name not in files.info]
    if missing:
        hint = "" if missing != [_HEAD] else " (tie_word_embeddings: true, if it shares them)"
        raise UserError(
            f"{files.folder}: config.json asks for {_listed(missing)}, which no safetensors file "
            f"there holds; use the config.json that belongs to these weights{hint}."
        )
    for name, shape in expected.items():
        info = files.info[name]
        if info.shape != shape:
            raise UserError(
                f"{info.file}: {name} has shape {list(info.shape)}; expected {list(shape)} by "
                "config.json; use the config.json that belongs to these weights."
            )
        if info.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{info.file}: {name} has dtype {info.dtype}; expected {', '.join(FLOAT_DTYPES)}; "
                "use the repository of the unquantized model."
            )
    tied = {_HEAD} if cfg.tie_embedding else set()
    leftover = [
        name
        for name in files.info
        if name not in expected and name not in tied and not name.endswith(_INERT)
    ]
    if leftover:
        raise UserError(
            f"{files.info[leftover[0]].file}: {_listed(leftover)} has no place in the model that "
            "config.json describes; use the config.json that belongs to these weights."
        )


def _settle_tied_head(files: TensorFiles, names: dict[str, list[str]], embedding: str) -> None:
    """A tied model may be stored as the embedding, as the head, or as both, which must agree."""
    if embedding not in files.info:
        names["embed/embedding"] = [_HEAD]
        return
    head, table = files.info[_HEAD], files.info[embedding]
    same = head.shape == table.shape and all(
        np.array_equal(files.read(_HEAD, rows), files.read(embedding, rows))
        for rows in (
            slice(start, start + _COMPARED_ROWS)
            for start in range(0, head.shape[0], _COMPARED_ROWS)
        )
    )
    if not same:
        raise UserError(
            f"{head.file}: {_HEAD} differs from {embedding}, though config.json ties them; set "
            "tie_word_embeddings: false there."
        )


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more tensors" if len(names) > most else ""
    return ", ".join(names[:most]) + more
