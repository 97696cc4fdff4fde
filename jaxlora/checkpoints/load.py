"""Hugging Face weights in: streamed tensor by tensor, quantized on the way, checked beforehand."""

import functools
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlora.checkpoints.gguf_files import gguf_config, gguf_file, open_weights
from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.checkpoints.matrices import QuantSpec, Reader, Split, empty, put
from jaxlora.checkpoints.prequantized import STORAGE_KEYS, read_storage
from jaxlora.checkpoints.regions import Region
from jaxlora.checkpoints.sources import Sources, find_sources
from jaxlora.checkpoints.storage import Storage
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, unflatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import describe
from jaxlora.ops.arrays import FOUR_BIT, QuantizedArray
from jaxlora.ops.quantize import unpack

_log = logging.getLogger(__name__)


def read_model_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns what config.json says, translated, and its raw content.

    Raises:
      UserError: no config.json, bad JSON, an unsupported model, or a way of quantizing that is
        not supported.
    """
    file = gguf_file(folder)
    path = file or Path(folder) / "config.json"
    if file is not None:
        raw = gguf_config(file)
    else:
        raw = read_json_object(path, "expected a model folder in Hugging Face's layout")
    try:
        read_storage(raw)
        return read_config({k: v for k, v in raw.items() if k not in STORAGE_KEYS}), raw
    except UserError as error:
        raise UserError(f"{path.parent}/{error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a field has a value of the wrong kind ({error}).") from error


def storage_of(folder: Path) -> Storage | None:
    """Returns how the weights of a model folder are quantized, None for plain ones.

    Raises:
      UserError: a way of quantizing that is not supported.
    """
    path = Path(folder) / "config.json"
    if gguf_file(folder) is not None or not path.is_file():
        return None
    try:
        return read_storage(read_json_object(path, ""))
    except UserError as error:
        raise UserError(f"{path.parent}/{error}") from error


def to_device(path: str, leaf: Any) -> Any:
    """Puts a host leaf on the default device; the default `place` of `load_params`."""
    placed = jax.tree.map(lambda x: jax.device_put(x, may_alias=True), leaf)
    return unpack(placed) if isinstance(leaf, QuantizedArray) and leaf.packed else placed


def load_params(
    folder: Path,
    cfg: ModelConfig,
    *,
    dtype: DTypeLike,
    quantization: QuantSpec | None = None,
    place: Callable[[str, Any], Any] = to_device,
    split: Split | None = None,
    progress: Callable[[int, int], None] | None = None,
    trained: Collection[str] = (),
    only: Collection[str] | None = None,
    optional: Collection[str] = (),
    needed: Callable[[str], Region | None] | None = None,
) -> Tree:
    """Returns the parameter tree of a model folder.

    Weights that are quantized in the files stay as they are. Host memory peaks at the leaves
    loaded so far plus one leaf and about two tensors; large leaves come first, when there is room.

    Args:
      folder: holds config.json and the safetensors.
      cfg: from `read_model_config`.
      dtype: dtype of plain leaves, and the one quantized leaves stand for.
      quantization: how to store the linear weights, and embedding and head if it says so; norms
        and biases stay plain.
      place: given a path and its complete host leaf, returns the leaf to keep, e.g. sharded; int4
        leaves come two values a byte, see `QuantizedArray.packed`.
      split: given path, layer, linear matrix and what stores a matrix, returns the layer's leaf:
        how an adapter is taken out of the base on the way (`jaxlora.lora.Splitter`).
      progress: called with elements read so far and in all, before every tensor and at the end;
        what another process reads counts as read.
      trained: paths of leaves that are read in float32 and never quantized.
      only: paths of the leaves to read; None: all.
      optional: paths of leaves that the files may lack; the tree then lacks them too.
      needed: given a path, the part of each of its matrices that `place` will look at; None for
        all. The rest is not read, and is undefined in what `place` gets.

    Raises:
      UserError: missing, leftover or misshapen tensors (found before any is read), damaged files,
        a `quantization` that contradicts the files'.
    """
    files, specs, storage = open_weights(folder), describe(cfg), storage_of(folder)
    if split is not None and storage is not None:
        raise UserError(
            f"{folder}: is quantized already ({storage.name}); an adapter that is split off the "
            "base, as PiSSA, OLoRA and LoftQ do, needs the unquantized model."
        )
    reader = _reader(files, jnp.dtype(dtype), quantization, storage)
    plain = Reader(files, jnp.dtype(jnp.float32), None, storage)
    sources = find_sources(files, specs, cfg, storage, optional)
    specs = {p: s for p, s in specs.items() if p in sources and (only is None or p in only)}
    tell, total, done = progress or _nobody, sum(spec.size for spec in specs.values()), 0
    leaves = {}
    for path, spec in sorted(specs.items(), key=lambda item: -reader.size(item[1])):
        own, leaf = plain if path in trained else reader, None
        whole = path in trained or _is_mixed(path, sources[path], storage, files)
        for at, names in sources[path].items():
            tell(done, total)
            done += spec.size // len(sources[path])
            region = None if split or needed is None else needed(path)
            if region is not None and spec.parts:
                if leaf is not None and not region.holds(at[-1]):
                    continue  # another process reads it
                region = region.inner()
            region = own.settled(region, names, spec, plain=whole)
            bound = _bound(split, path, at)
            part = own.matrix(names, spec, plain=whole, split=bound, region=region)
            if leaf is None:
                # Buffers keep their precision, as in transformers.
                kept = jnp.dtype(jnp.float32) if spec.kind == "buffer" else own.dtype
                leaf = empty(part, spec.full_shape[: len(at)], kept, region)
            put(leaf, at, part, f"{files.folder}: {names[0]}", region)
            part = None  # or a large table would be there twice while it is placed
        # Placing is asynchronous, and the host's copy would stay beside the next leaf's.
        leaves[path], leaf = jax.block_until_ready(place(path, leaf)), None
    tell(done, total)
    return unflatten({path: leaves[path] for path in specs})


def _nobody(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _bound(split: Split | None, path: str, at: tuple[int, ...]) -> Split | None:
    return split and functools.partial(split, path, at[0] if at else 0)


def check_weights(folder: Path, cfg: ModelConfig, optional: Collection[str] = ()) -> frozenset[str]:
    """Compares the weight files with the model they should hold; reads headers only.

    Args:
      folder: holds config.json and the safetensors.
      cfg: the model.
      optional: paths of leaves that the files may lack.

    Returns:
      those they do lack.

    Raises:
      UserError: missing, leftover or misshapen tensors, damaged files.
    """
    files = open_weights(folder)
    found = find_sources(files, describe(cfg), cfg, storage_of(folder), optional)
    return frozenset(optional) - found.keys()


def _reader(
    files: Tensors, dtype: np.dtype, wanted: QuantSpec | None, storage: Storage | None
) -> Reader:
    settled = _settled(wanted, storage, files.folder)
    return Reader(files, dtype, settled, storage, wanted and wanted.embeddings)


def _settled(wanted: QuantSpec | None, storage: Storage | None, folder: Path) -> QuantSpec | None:
    """How to quantize what is plain in the files: not at all where others have done it."""
    if storage is None or wanted is None:
        return wanted
    # load_in_4bit says nf4 and means 4 bits: it is accepted as what the files already are.
    accepted = {storage.format} | ({"nf4"} if storage.format in FOUR_BIT else set())
    if wanted.format not in accepted:
        raise UserError(
            f"{Path(folder) / 'config.json'}: the weights are quantized already ({storage.name}), "
            f"which contradicts {wanted.format}; leave the quantization out to use them as they "
            "are."
        )
    return None


def _is_mixed(path: str, sources: Sources, storage: Storage | None, files: Tensors) -> bool:
    """Whether some layers of a leaf are quantized and others are not; one leaf stores all alike."""
    if storage is None:
        return False
    held = [storage.holds(name, files.info) for names in sources.values() for name in names]
    if any(held) and not all(held):
        _log.warning(
            "%s: %s of %s tensors are quantized (%s), the others plain; all are kept plain.",
            path,
            sum(held),
            len(held),
            storage.name,
        )
        return True
    return False
