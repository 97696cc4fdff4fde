"""A model out as a Hugging Face folder that transformers loads, one tensor at a time."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlora.checkpoints.atomic import staged
from jaxlora.checkpoints.gguf_files import gguf_config, gguf_file
from jaxlora.checkpoints.prequantized import STORAGE_KEYS
from jaxlora.checkpoints.write import write_tensors
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec, describe
from jaxlora.ops.matmul import materialize

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
_METADATA = {"format": "pt"}


def save_model(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    folder: Path,
    *,
    source_folder: Path | None = None,
    tokenizer_folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Writes config, tokenizer and weights; host memory peaks at one layer's tensor.

    Args:
      params: leaves may be plain, quantized or LoRA; each is saved as the matrix it stands for.
      cfg: the model's shape.
      folder: where to; appears whole or not at all.
      source_folder: config.json, generation_config.json and tokenizer are copied from here; of a
        GGUF file only what says what the model is.
      tokenizer_folder: the tokenizer, and generation_config.json if it has one, is copied from
        here instead.
      config: content of config.json if `source_folder` has none, or not the right one.
      dtype: float32, float16 or bfloat16.
      max_shard_bytes: weights beyond this are split into several files with an index.
      overwrite: replace a model that is already in `folder`.

    Raises:
      UserError: a value is not finite, `folder` holds a model already, the disk is full.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    old = _model_files(folder)
    if old and not overwrite:
        raise UserError(f"{folder}: already holds a model ({old[0]}); choose a new folder.")
    tensors = saved_tensors(params, cfg)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with staged(folder) as stage:
        _write_config(stage, source_folder, tokenizer_folder, config, dtype)
        shards = list(_shards(shapes, dtype.itemsize, max_shard_bytes))
        files = _file_names(len(shards))
        for file, shard in zip(files, shards, strict=True):
            write_tensors(
                stage / file,
                shard,
                lambda name: tensors[name].values(dtype),
                dtype=dtype,
                metadata=_METADATA,
            )
        if len(shards) > 1:
            _write_json(stage / "model.safetensors.index.json", _index(files, shards, dtype))
        new = _model_files(stage)
    for name in set(old) - set(new):
        (folder / name).unlink()


def _model_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model*.safetensors*"))


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """One tensor of a checkpoint: share `share` along the last axis of ``leaf[at]``."""

    name: str
    spec: ParamSpec
    leaf: Any
    at: tuple[int, ...]
    share: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face stores it."""
        return self.spec.tensor_shape

    def values(self, dtype: DTypeLike) -> np.ndarray:
        """Returns the host values, laid out as Hugging Face stores them.

        Raises:
          UserError: a value is not finite in `dtype`.
        """
        dtype = jnp.dtype(dtype)
        part = jax.tree.map(lambda x: x[self.at], self.leaf)
        matrix = np.asarray(_materialize(part, dtype))
        if not np.isfinite(matrix).all():
            raise UserError(
                f"{self.name}: has values that are not finite in {dtype.name} (diverged training, "
                "or out of range); nothing was written."
            )
        shares = len(self.spec.hf_names)
        matrix = np.split(matrix, shares, axis=-1)[self.share] if shares > 1 else matrix
        return np.swapaxes(matrix, -1, -2) if self.spec.transposed else matrix


def saved_tensors(params: Mapping[str, Any], cfg: ModelConfig) -> dict[str, SavedTensor]:
    """Returns the tensors of a checkpoint by name, in the order of the file.

    Args:
      params: leaves may be plain, quantized or LoRA.
      cfg: the model's shape.
    """
    leaves, specs = flatten(params), describe(cfg)
    assert leaves.keys() == specs.keys(), leaves.keys() ^ specs.keys()
    return {
        name: SavedTensor(name, spec, leaves[path], at, share)
        for path, spec in specs.items()
        for at, names in spec.sources().items()
        for share, name in enumerate(names)
    }


@functools.partial(jax.jit, static_argnums=1)
def _materialize(leaf: Any, dtype: np.dtype) -> jax.Array:
    return materialize(leaf, dtype)


def _shards(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, most: float
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Groups of whole tensors of at most `most` bytes (a larger tensor is alone)."""
    shard, size = {}, 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * itemsize
        if shard and size + tensor_bytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += tensor_bytes
    yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]


def _index(files: list[str], shards: list[dict], dtype: np.dtype) -> dict[str, Any]:
    elements = sum(math.prod(shape) for shard in shards for shape in shard.values())
    return {
        "metadata": {"total_size": elements * dtype.itemsize},
        "weight_map": {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        },
    }


def _write_config(
    stage: Path,
    source: Path | None,
    tokenizer: Path | None,
    config: Mapping[str, Any] | None,
    dtype: np.dtype,
) -> None:
    # New special tokens change how a model generates: who saved the tokenizer has told so.
    told = tokenizer if tokenizer and (Path(tokenizer) / GENERATION_FILE).is_file() else source
    copied = [(tokenizer or source, _TOKENIZER_FILES), (told, (GENERATION_FILE,))]
    for folder, name in ((folder, name) for folder, names in copied for name in names):
        if folder is not None and (Path(folder) / name).is_file():
            shutil.copyfile(Path(folder) / name, stage / name)
    if config is None:
        assert source is not None, "one of source_folder and config must say what the model is"
        file = gguf_file(source)
        written = Path(source) / "config.json"
        config = gguf_config(file) if file else json.loads(written.read_text(encoding="utf-8"))
        assert config is not None
    # Older readers know only torch_dtype; newer ones write dtype and read both.
    words = [word for word in ("dtype", "torch_dtype") if word in config] or ["torch_dtype"]
    # What was quantized there is plain here.
    config = {key: value for key, value in config.items() if key not in STORAGE_KEYS}
    _write_json(stage / "config.json", {**config, **dict.fromkeys(words, dtype.name)})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
