"""Hugging Face weights in: streamed tensor by tensor, quantized on the way, checked beforehand."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlora.checkpoints.gguf_files import gguf_config, gguf_file, open_weights
from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.tensors import FLOAT_DTYPES
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, unflatten
from jaxlora.lora.initializers import Store
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import FAMILIES
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import ParamSpec, describe, head_tensor
from jaxlora.ops.quantize import quantize

# The kinds of parameter that `quantization` is for.
_QUANTIZED = ("linear", "experts")
# Where in a leaf each group of tensors goes; see `ParamSpec.sources`.
Sources = dict[tuple[int, ...], tuple[str, ...]]
Split = Callable[..., Any]
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
    file = gguf_file(folder)
    path = file or Path(folder) / "config.json"
    if file is not None:
        raw = gguf_config(file)
    else:
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
    split: Split | None = None,
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
      split: given path, layer, linear matrix and what stores a matrix, returns the layer's leaf:
        how an adapter is taken out of the base on the way (`jaxlora.lora.Splitter`).
      progress: called with elements read so far and in all, after every tensor.

    Raises:
      UserError: missing, leftover or misshapen tensors (found before any is read), damaged files.
    """
    files = open_weights(folder)
    specs = describe(cfg)
    sources = _check(files, specs, cfg)
    total, done = sum(spec.size for spec in specs.values()), 0
    leaves = {}
    for path, spec in specs.items():
        leaf = None
        for at, names in sources[path].items():
            store = functools.partial(_store, spec, jnp.dtype(dtype), quantization)
            if split is not None and spec.kind == "linear":
                store = functools.partial(split, path, at[0] if at else 0, store=store)
            part = _read(files, names, spec, store)
            if leaf is None:
                leaf = _empty(part, spec.full_shape[: len(at)], jnp.dtype(dtype))
            jax.tree.map(lambda whole, piece, at=(*at, ...): _copy(whole[at], piece), leaf, part)
            done += spec.size // len(sources[path])
            if progress is not None:
                progress(done, total)
        leaves[path] = place(path, leaf)
    return unflatten(leaves)


def check_weights(folder: Path, cfg: ModelConfig) -> None:
    """Compares the weight files with the model they should hold; reads headers only.

    Raises:
      UserError: missing, leftover or misshapen tensors, damaged files.
    """
    _check(open_weights(folder), describe(cfg), cfg)


def _read(files: Tensors, names: tuple[str, ...], spec: ParamSpec, store: Store) -> Any:
    """One matrix ``[in, out]`` as it is to be stored."""
    tensors = [files.read(name) for name in names]
    if spec.transposed:
        tensors = [np.swapaxes(tensor, -1, -2) for tensor in tensors]
    matrix = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=-1)
    try:
        return store(matrix)
    except UserError as error:
        raise UserError(f"{files.info[names[0]].file}: {names[0]}: {error}") from error


def _store(
    spec: ParamSpec, dtype: np.dtype, quantization: QuantSpec | None, matrix: np.ndarray
) -> Any:
    """Quantized if the parameter is to be, else in the dtype of the file."""
    if quantization is None or spec.kind not in _QUANTIZED:
        return matrix
    options = dataclasses.asdict(quantization)
    return _quantized(matrix, options.pop("format"), dtype=dtype.name, **options)


def _quantized(matrix: np.ndarray, format: str, **options: Any) -> Any:
    if matrix.ndim == 2:
        return quantize(matrix, format, **options)
    each = [_quantized(expert, format, **options) for expert in matrix]
    return jax.tree.map(lambda *parts: np.stack(parts), *each)


def _empty(part: Any, lead: tuple[int, ...], dtype: np.dtype) -> Any:
    """Host buffers for a whole leaf of which `part` is one of ``[*lead]``."""
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


def _check(files: Tensors, specs: Mapping[str, ParamSpec], cfg: ModelConfig) -> dict[str, Sources]:
    """Compares names, shapes and dtypes with the model before anything is read.

    Returns:
      where every leaf comes from: as its spec says, but for a tied head and a left-out prefix.
    """
    sources = {path: spec.sources() for path, spec in specs.items()}
    head, tied = head_tensor(cfg), []
    prefix = FAMILIES[cfg.family].prefix
    if not any(name.startswith(prefix) for name in files.info):
        sources = {path: _without(prefix, each) for path, each in sources.items()}
    for ending, older in FAMILIES[cfg.family].older:
        sources = {path: _renamed(files, each, ending, older) for path, each in sources.items()}
    if cfg.tie_embedding and head in files.info:
        tied = [head]
        _settle_tied_head(files, sources, head)
    expected = {
        name: specs[path].tensor_shape
        for path, each in sources.items()
        for names in each.values()
        for name in names
    }
    _check_missing(files, list(expected), head)
    _check_shapes(files, expected)
    inert = FAMILIES[cfg.family].buffers
    leftover = [
        name
        for name in files.info
        if name not in expected and name not in tied and not name.endswith(inert)
    ]
    if leftover:
        raise UserError(
            f"{files.info[leftover[0]].file}: {_listed(leftover)} has no place in the model that "
            "config.json describes; use the config.json that belongs to these weights."
        )
    return sources


def _without(prefix: str, sources: Sources) -> Sources:
    return {at: tuple(name.removeprefix(prefix) for name in names) for at, names in sources.items()}


def _renamed(files: Tensors, sources: Sources, ending: str, older: str) -> Sources:
    """`sources` with the older names of tensors that the files have under those only."""

    def found(name: str) -> str:
        old = name.removesuffix(ending) + older
        return (
            old if name.endswith(ending) and name not in files.info and old in files.info else name
        )

    return {at: tuple(map(found, names)) for at, names in sources.items()}


def _check_missing(files: Tensors, expected: list[str], head: str) -> None:
    missing = [name for name in expected if name not in files.info]
    if missing:
        hint = "" if missing != [head] else " (tie_word_embeddings: true, if it shares them)"
        raise UserError(
            f"{files.folder}: config.json asks for {_listed(missing)}, which no safetensors file "
            f"there holds; use the config.json that belongs to these weights{hint}."
        )


def _check_shapes(files: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
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


def _settle_tied_head(files: Tensors, sources: dict[str, Sources], head: str) -> None:
    """A tied model may be stored as the embedding, as the head, or as both, which must agree."""
    ((embedding,),) = sources["embed/embedding"].values()
    if embedding not in files.info:
        sources["embed/embedding"] = {(): (head,)}
        return
    first, second = files.info[head], files.info[embedding]
    same = first.shape == second.shape and all(
        np.array_equal(files.read(head, rows), files.read(embedding, rows))
        for rows in (
            slice(start, start + _COMPARED_ROWS)
            for start in range(0, first.shape[0], _COMPARED_ROWS)
        )
    )
    if not same:
        raise UserError(
            f"{first.file}: {head} differs from {embedding}, though config.json ties them; set "
            "tie_word_embeddings: false there."
        )


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more tensors" if len(names) > most else ""
    return ", ".join(names[:most]) + more
