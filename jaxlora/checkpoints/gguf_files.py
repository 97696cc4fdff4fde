"""A GGUF file as a model folder looks to the loader: tensors by Hugging Face's names, a config."""

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxlora.checkpoints.gguf_layout import Layout, layout_of
from jaxlora.checkpoints.tensor_view import Source, TensorView
from jaxlora.checkpoints.tensors import TensorFiles, TensorInfo
from jaxlora.checkpoints.torchtune import interleaved_to_halves
from jaxlora.core.errors import UserError
from jaxlora.ops.rope import RopeScaling, rope_frequencies

SUFFIX = ".gguf"
# llama.cpp keeps the divisors of llama3's rotary frequencies as a tensor.
ROPE_FACTORS = "rope_freqs.weight"
_FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def gguf_file(path: Path) -> Path | None:
    """Returns the GGUF file that `path` is, or that a folder without other weights holds.

    Raises:
      UserError: several such files, of which one must be named.
    """
    path = Path(path)
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UserError(f"{path}: holds several GGUF files ({names}); name the one to load.")
    return found[0] if found else None


class GgufFile:
    """The tensors and metadata of a GGUF file, by llama.cpp's names; blocks are dequantized.

    Attributes:
      info: ``{tensor name: TensorInfo}``; quantized ones read as float32.
      fields: metadata keys and values; arrays of them (the vocabulary) are left out.
      types: ``{tensor name: llama.cpp's type}``, e.g. ``"Q4_K"``.

    Raises:
      UserError: the gguf package is missing; a damaged or split file, or an unknown type.
    """

    def __init__(self, file: Path):
        self.folder = self.file = Path(file)
        self.metadata: dict[str, str] = {}
        reader = _open(self.file)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.types = {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}
        self.fields: dict[str, Any] = {
            key: _plain(field.contents())
            for key, field in reader.fields.items()
            if len(field.types) == 1
        }
        if self.fields.get("split.count", 0) > 1:
            raise UserError(
                f"{file}: is one part of several; join them with llama-gguf-split --merge."
            )
        for name, kind in self.types.items():
            if kind not in _FLOATS and kind not in _BLOCKS:
                raise UserError(
                    f"{file}: {name} has type {kind}; supported: {', '.join((*_FLOATS, *_BLOCKS))}."
                )
        self.info = {
            name: TensorInfo(
                self.file,
                _FLOATS.get(self.types[name], "F32"),
                tuple(int(size) for size in reversed(tensor.shape)),
            )
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a tensor, or only `rows` of its first axis."""
        import gguf

        tensor, kind = self._tensors[name], self.types[name]
        data = tensor.data if rows is None else tensor.data[rows]
        if kind == "BF16":
            return np.array(data).view(ml_dtypes.bfloat16)
        if kind in _FLOATS:
            return np.array(data)
        return gguf.quants.dequantize(np.array(data), tensor.tensor_type)


def _plain(value: Any) -> Any:
    """A float as it was written before the file made it a float32: 1e-05, not 9.9999997e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{file}: reading GGUF needs the gguf package; pip install 'jaxlora[gguf]'."
        ) from None
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{file}: not a whole GGUF file ({error}); download or copy it again."
        ) from error


def open_weights(path: Path) -> TensorFiles | TensorView:
    """Returns the weights of a model folder, or of a GGUF file by Hugging Face's names.

    Raises:
      UserError: no weights there, or damaged ones, or a GGUF tensor that has no such name.
    """
    file = gguf_file(path)
    if file is None:
        return TensorFiles(path)
    opened = _opened(file)
    layout = _layout(opened)
    sources = {}
    for name in opened.info:
        hf_name = layout.hf_name(name)
        if name == ROPE_FACTORS:
            continue
        if hf_name is None:
            raise UserError(
                f"{file}: {name} is no tensor that jaxlora knows of {layout.gguf} models; use the "
                "original model in Hugging Face's layout."
            )
        sources[hf_name] = Source(name, _change(opened, layout, hf_name))
    return TensorView(opened, sources)


def _opened(file: Path) -> GgufFile:
    """The file, kept while it does not change: reading a large vocabulary takes seconds."""
    status = file.stat()
    return _opened_as(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _opened_as(file: Path, size: int, time: int) -> GgufFile:
    return GgufFile(file)


def _layout(opened: GgufFile) -> Layout:
    architecture = opened.fields.get("general.architecture", "none")
    try:
        return layout_of(architecture, lambda layout: layout.gguf)
    except UserError as error:
        raise UserError(f"{opened.file}: {error}") from error


def _change(opened: GgufFile, layout: Layout, hf_name: str) -> Any:
    if layout.is_interleaved(hf_name):
        return functools.partial(interleaved_to_halves, head_dim=_head_dim(opened, layout))
    offset = layout.offset(hf_name)
    return (lambda values: values - np.float32(offset)) if offset else None


def _head_dim(opened: GgufFile, layout: Layout) -> int:
    fields, prefix = opened.fields, layout.gguf
    given = fields.get(f"{prefix}.attention.key_length")
    return given or fields[f"{prefix}.embedding_length"] // fields[f"{prefix}.attention.head_count"]


def gguf_config(file: Path) -> dict[str, Any]:
    """Returns what config.json would say of the model in a GGUF file.

    Raises:
      UserError: damaged, another architecture, a rotary scaling that is not understood.
    """
    opened = _opened(file)
    layout = _layout(opened)
    prefix, names = layout.gguf, opened.info
    required = ("embedding_length", "block_count", "attention.head_count")
    missing = [key for key in required if f"{prefix}.{key}" not in opened.fields]
    if missing or "token_embd.weight" not in names:
        what = f"{prefix}.{missing[0]}" if missing else "token_embd.weight"
        raise UserError(f"{file}: {what} is missing; is it a whole model?")
    config: dict[str, Any] = {
        "architectures": [layout.hf],
        "model_type": layout.model_type,
        **layout.fixed,
        "tie_word_embeddings": "output.weight" not in names,
    }
    for key, field in layout.keys.items():
        if f"{prefix}.{key}" in opened.fields:
            config[field] = opened.fields[f"{prefix}.{key}"]
    for field, name in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_gate.bias")):
        if layout.interleaved and f"blk.0.{name}" in names:
            config[field] = True
    config["vocab_size"] = names["token_embd.weight"].shape[0]
    head_dim = _head_dim(opened, layout)
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        config["head_dim"] = head_dim
    config |= {
        field: derive({**config, "head_dim": head_dim}) for field, derive in layout.derived.items()
    }
    for word in ("bos", "eos"):
        token = opened.fields.get(f"tokenizer.ggml.{word}_token_id")
        if token is not None:
            config[f"{word}_token_id"] = token
    scaling = _rope_scaling(opened, layout, float(config.get("rope_theta", 10000.0)))
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(opened: GgufFile, layout: Layout, theta: float) -> dict[str, Any] | None:
    prefix = layout.gguf
    kind = opened.fields.get(f"{prefix}.rope.scaling.type", "none")
    if ROPE_FACTORS in opened.info:
        return _llama3_scaling(opened, _head_dim(opened, layout), theta)
    if kind == "linear":
        return {"rope_type": "linear", "factor": opened.fields[f"{prefix}.rope.scaling.factor"]}
    if kind != "none":
        raise UserError(
            f"{opened.file}: {prefix}.rope.scaling.type: {kind!r} is not supported; expected none "
            "or linear."
        )
    return None


def _llama3_scaling(opened: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """The numbers of Llama 3.1 and later that explain the factors, which are all the file has."""
    factors = opened.read(ROPE_FACTORS).astype(np.float32)
    known = RopeScaling("llama3", float(factors.max()))
    if not np.allclose(factors, llama3_factors(head_dim, theta, known), rtol=1e-4):
        raise UserError(
            f"{opened.file}: {ROPE_FACTORS} has factors that are not Llama 3's; use the original "
            "model in Hugging Face's layout."
        )
    return {
        "rope_type": "llama3",
        "factor": known.factor,
        "low_freq_factor": known.low_freq_factor,
        "high_freq_factor": known.high_freq_factor,
        "original_max_position_embeddings": known.original_context,
    }


def llama3_factors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns what llama.cpp divides each rotary frequency by."""
    plain = rope_frequencies(head_dim, theta, None)
    return (plain / rope_frequencies(head_dim, theta, scaling)).astype(np.float32)
