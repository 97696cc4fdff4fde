"""`merge`: base + adapter as one model that anything reading Hugging Face folders can load."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.adapter import LoadedAdapter, read_adapter
from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.fitted import load_base, written_config
from jaxlora.checkpoints.gguf_files import gguf_file, open_weights
from jaxlora.checkpoints.gguf_write import check_target, save_gguf
from jaxlora.checkpoints.label_head import label_config
from jaxlora.checkpoints.load import QuantSpec, read_model_config, storage_of
from jaxlora.checkpoints.peft_config import CONFIG_FILE
from jaxlora.checkpoints.peft_records import trained_split, trained_storage
from jaxlora.checkpoints.save import save_model
from jaxlora.checkpoints.tensors import FLOAT_DTYPES
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.data.tokenizer import load_tokenizer, pad_id
from jaxlora.generation.model import locate
from jaxlora.generation.probe import probe_logits
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec, describe
from jaxlora.ops.matmul import materialize

Storage = QuantSpec | Literal["trained"] | None


@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """Absolute differences between the logits of two models at the same tokens."""

    largest: float
    mean: float


@dataclasses.dataclass(frozen=True)
class MergeDifferences:
    """How far a merged model is from the model that was trained: adapter on its quantized base.

    Attributes:
      storage: how training stored the base.
      plain: the adapter added to the base as it is on disk.
      simulated: the adapter added to the base as training saw it, quantized and back.
      logit_std: standard deviation of the trained model's logits, to read the differences against.
    """

    storage: QuantSpec
    plain: LogitDifference
    simulated: LogitDifference
    logit_std: float

    def table(self, *, simulated: bool) -> str:
        """Returns the differences as lines of text; `simulated`: which of the two was written."""
        rows = (
            ("added to the base as it is on disk", self.plain, not simulated),
            ("added to the base as training saw it", self.simulated, simulated),
        )
        head = (
            f"logits beside the adapter's on its {self.storage.format} base (which vary by "
            f"{self.logit_std:.2f}):"
        )
        return "\n".join(
            [head]
            + [
                f"  {name} ({'written' if chosen else 'not written'}): largest difference "
                f"{difference.largest:.1e}, mean {difference.mean:.1e}"
                for name, difference, chosen in rows
            ]
        )


def merge(
    model: str | Path,
    adapter: str | Path | None,
    output: str | Path,
    *,
    revision: str | None = None,
    quantization: Storage = None,
    dtype: str | None = None,
    gguf: str | None = None,
) -> Path:
    """Writes ``base + scale * B A`` in Hugging Face's layout, or as GGUF; returns where.

    Sums are taken in float32, one tensor at a time, and rounded once to `dtype`.

    Args:
      model: folder or hub id of the base, or of an adapter that names its base.
      adapter: PEFT adapter folder or hub id.
      output: new folder; with `gguf` a new file.
      revision: branch, tag or commit of a hub base.
      quantization: None adds the adapter to the base as it is on disk; ``"trained"`` to the base
        as QLoRA saw it (quantized and back), which the adapter tells if jaxlora trained it; a
        `QuantSpec` says how it was quantized.
      dtype: of the files; default the base's own.
      gguf: write one file for llama.cpp instead, its matrices as ``F16`` or ``Q8_0``. A model
        without an adapter may be written so too.

    Raises:
      UserError: anything missing, damaged or unfitting; an output folder that holds a model or an
        adapter.
    """
    parts = _open(model, adapter, revision)
    if parts.folder is None and gguf is None:
        raise UserError(f"{model}: is no adapter; give one with --adapter.")
    if gguf is None and (Path(output) / CONFIG_FILE).is_file():
        # transformers would put that adapter on top of what is written beside it.
        raise UserError(f"{output}: holds an adapter; choose a new folder for the merged model.")
    quantization = _storage(parts, quantization)
    content = written_config(parts.raw, parts.stored, parts.cfg)
    foreign = gguf is not None or gguf_file(parts.base) is not None
    tokenizer = _tokenizer(parts) if foreign or parts.cfg.num_labels else None
    if parts.adapter is not None and parts.cfg.num_labels:
        content = label_config(content, parts.cfg, parts.adapter.labels, pad_id(tokenizer))
    if gguf is not None:
        check_target(Path(output), parts.cfg, tokenizer)
    own = _stored_dtype(parts.base)
    params = parts.load(
        dtype=jnp.dtype(own), quantization=quantization, place=lambda path, leaf: leaf
    )
    output, cfg = Path(output), parts.cfg
    if gguf is not None:
        name = parts.base.stem if parts.folder is None else parts.folder.name
        save_gguf(params, cfg, output, kind=gguf, tokenizer=tokenizer, name=name)
        return output
    save_model(
        params,
        cfg,
        output,
        source_folder=parts.base,
        tokenizer_folder=_beside(parts),
        config=content,
        dtype=jnp.dtype(dtype or own),
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(str(output))
    return output


def merge_differences(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    quantization: Storage = None,
    dtype: str | None = None,
) -> MergeDifferences | None:
    """Measures what either way of merging a QLoRA adapter changes; None for one of a plain base.

    Compares logits, computed in float32 at a few random tokens, with those of the adapter on its
    quantized base. Nothing is written.

    Args:
      model, adapter, revision, quantization, dtype: as for `merge`; None takes the adapter's word
        for how its base was quantized.

    Raises:
      UserError: as `merge`.
    """
    parts = _open(model, adapter, revision)
    if parts.folder is None:
        return None
    given = quantization if isinstance(quantization, QuantSpec) else None
    storage = given or trained_storage(parts.folder)
    if storage is None:
        return None
    own = jnp.dtype(_stored_dtype(parts.base))
    rounded = jnp.dtype(dtype or own)
    specs = describe(parts.cfg)
    params = parts.load(dtype=own, quantization=storage)
    trained = probe_logits(parts.cfg, params)
    simulated = probe_logits(parts.cfg, _folded(params, specs, rounded))
    del params
    plain = probe_logits(parts.cfg, _folded(parts.load(dtype=own), specs, rounded))
    return MergeDifferences(
        storage, _difference(plain, trained), _difference(simulated, trained), float(trained.std())
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    base: Path
    folder: Path | None
    stored: ModelConfig
    raw: dict[str, Any]
    adapter: LoadedAdapter | None

    @property
    def cfg(self) -> ModelConfig:
        return self.stored if self.adapter is None else self.adapter.cfg

    def load(self, **options: Any) -> Tree:
        """Base weights with the adapter in place."""
        trained = {} if self.adapter is None else self.adapter.parts
        params = load_base(self.base, self.stored, self.cfg, trained=trained, **options)
        return params if self.adapter is None else self.adapter.on(params)


def _open(model: str | Path, adapter: str | Path | None, revision: str | None) -> _Parts:
    base, folder = locate(model, adapter, revision)
    stored, raw = read_model_config(base)
    if folder is None:
        return _Parts(base, None, stored, raw, None)
    made = read_adapter(folder, stored, fingerprint=base_fingerprint(base))
    return _Parts(base, folder, stored, raw, made)


def _storage(parts: _Parts, quantization: Storage) -> QuantSpec | None:
    if quantization != "trained":
        return quantization
    storage = None if parts.folder is None else trained_storage(parts.folder)
    split = None if parts.folder is None else trained_split(parts.folder)
    if split is not None:
        raise UserError(
            f"{parts.folder}: started by {split} as a part of its base, and only the rest was "
            "quantized, which nobody else has; leave out --quantization: the plain base comes "
            "nearest to the model that was trained."
        )
    if storage is None:
        raise UserError(
            f"{parts.folder or parts.base}: does not say how its base was quantized in training "
            "(jaxlora's QLoRA adapters do); name the format instead: --quantization nf4, int4 or "
            "int8."
        )
    return storage


def _tokenizer(parts: _Parts) -> Any:
    return load_tokenizer(_beside(parts) or parts.base)


def _beside(parts: _Parts) -> Path | None:
    # A run saves the tokenizer beside its adapter, with the chat template it trained with.
    folder = parts.folder
    return folder if folder is not None and (folder / "tokenizer.json").is_file() else None


def _folded(params: Tree, specs: dict[str, ParamSpec], dtype: np.dtype) -> Tree:
    """The plain weights that a merged folder of `dtype` holds."""
    leaves = flatten(params)
    return unflatten({path: _fold(leaves[path], spec, dtype) for path, spec in specs.items()})


def _fold(leaf: Any, spec: ParamSpec, dtype: np.dtype) -> jax.Array:
    fold = jax.jit(lambda layer: materialize(layer, dtype))
    if spec.layers is None:
        return fold(leaf)
    # Layer by layer: the float32 sum of a whole stack would be several times the leaf.
    return jax.jit(lambda layers: jax.lax.map(fold, layers))(leaf)


def _difference(one: np.ndarray, other: np.ndarray) -> LogitDifference:
    distance = np.abs(one - other)
    return LogitDifference(float(distance.max()), float(distance.mean()))


def _stored_dtype(base: Path) -> str:
    names = {jnp.dtype(dtype).name for dtype in FLOAT_DTYPES.values()}
    _, raw = read_model_config(base)
    written = raw.get("dtype") or raw.get("torch_dtype")
    # Of a quantized base the tensors are scales and codes, whose dtype says little.
    if storage_of(base) is not None and written in names:
        return written
    infos = [info for info in open_weights(base).info.values() if info.dtype in FLOAT_DTYPES]
    largest = max(infos, key=lambda info: info.size)  # norms are often stored in float32
    return jnp.dtype(FLOAT_DTYPES[largest.dtype]).name
