"""A model out as one GGUF file, as llama.cpp's convert_hf_to_gguf.py writes it."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.checkpoints.atomic import staged
from jaxlora.checkpoints.gguf_files import ROPE_FACTORS, SUFFIX, llama3_factors
from jaxlora.checkpoints.gguf_layout import Layout, layout_of
from jaxlora.checkpoints.gguf_tokenizer import tokenizer_fields
from jaxlora.checkpoints.save import SavedTensor, saved_tensors
from jaxlora.checkpoints.torchtune import halves_to_interleaved
from jaxlora.core.errors import UserError
from jaxlora.models.config import ModelConfig

# llama.cpp's numbers of the kinds of file.
KINDS = {"F16": 1, "Q8_0": 7}
_QUANTIZATION_VERSION = 2


def save_gguf(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    file: Path,
    *,
    kind: str,
    tokenizer: Any,
    name: str = "model",
) -> None:
    """Writes a GGUF file; host memory peaks at one layer's tensor.

    Args:
      params: leaves may be plain, quantized or LoRA; each is saved as the matrix it stands for.
      cfg: the model's shape.
      file: new file; appears whole or not at all.
      kind: ``F16`` or ``Q8_0``, of the matrices; norms and biases are float32, and rows that no
        block of 32 fits float16.
      tokenizer: a transformers fast tokenizer.
      name: what the file calls the model.

    Raises:
      UserError: an architecture, rotary scaling or tokenizer without a word in GGUF; a value that
        is not finite; `file` is there already; the gguf package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{file}: writing GGUF needs the gguf package; pip install 'jaxlora[gguf]'."
        ) from None
    file = Path(file)
    layout, fields = check_target(file, cfg, tokenizer)
    fields = {**_model_fields(cfg, layout, kind, name), **fields}
    tensors: dict[str, tuple[SavedTensor, str]] = {}
    for tensor in saved_tensors(params, cfg).values():
        gguf_name = layout.gguf_name(tensor.name)
        assert gguf_name, f"{layout.gguf} has no name for {tensor.name}"
        tensors[gguf_name] = (tensor, _type_of(tensor, kind))
    with staged(file.parent) as stage:
        writer = gguf.GGUFWriter(stage / file.name, layout.gguf)
        for key, value in fields.items():
            _add(writer, key, value)
        factors = _rope_factors(cfg)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for gguf_name, (tensor, of) in tensors.items():
            qtype = gguf.GGMLQuantizationType[of]
            size = gguf.quant_shape_to_byte_shape(tensor.shape, qtype)
            writer.add_tensor_info(
                gguf_name, tensor.shape, np.dtype(np.float32), math.prod(size), raw_dtype=qtype
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in _values(cfg, layout, tensors, factors):
            writer.write_tensor_data(values)
        writer.close()


def check_target(file: Path, cfg: ModelConfig, tokenizer: Any) -> tuple[Layout, dict[str, Any]]:
    """Returns the model's layout and the tokenizer's metadata, before any weight is loaded.

    Raises:
      UserError: no ``.gguf`` name, `file` is there already, an architecture, rotary scaling or
        tokenizer without a word in GGUF.
    """
    if file.suffix != SUFFIX:
        raise UserError(f"{file}: expected a name that ends in {SUFFIX}.")
    if file.exists():
        raise UserError(f"{file}: is there already; choose a new name.")
    if cfg.rope_scaling is not None and cfg.rope_scaling.kind not in ("linear", "llama3"):
        raise UserError(
            f"{file}: rotary scaling {cfg.rope_scaling.kind!r} is not written to GGUF; supported: "
            "linear, llama3."
        )
    try:
        return layout_of(cfg.family, lambda layout: layout.hf), _checked_fields(tokenizer, cfg)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _type_of(tensor: SavedTensor, kind: str) -> str:
    if len(tensor.shape) < 2:
        return "F32"
    return "F16" if kind == "Q8_0" and tensor.shape[-1] % 32 else kind


def _values(
    cfg: ModelConfig,
    layout: Layout,
    tensors: Mapping[str, tuple[SavedTensor, str]],
    factors: np.ndarray | None,
) -> Iterator[np.ndarray]:
    import gguf

    if factors is not None:
        yield factors
    for tensor, kind in tensors.values():
        values = tensor.values(np.float16 if kind == "F16" else np.float32)
        if layout.is_interleaved(tensor.name):
            values = halves_to_interleaved(values, cfg.head_dim)
        offset = layout.offset(tensor.name)
        values = values + values.dtype.type(offset) if offset else values
        values = np.ascontiguousarray(values)
        yield gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def _rope_factors(cfg: ModelConfig) -> np.ndarray | None:
    scaling = cfg.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    return llama3_factors(cfg.head_dim, cfg.rope_theta, scaling)


def _model_fields(cfg: ModelConfig, layout: Layout, kind: str, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "context_length": cfg.max_context,
        "block_count": cfg.num_layers,
        "embedding_length": cfg.embed_dim,
        "feed_forward_length": cfg.mlp_dim,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": float(cfg.norm_eps),
        "rope.freq_base": float(cfg.rope_theta),
        "rope.dimension_count": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
    }
    if cfg.rope_scaling is not None and cfg.rope_scaling.kind == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(cfg.rope_scaling.factor)
    options = {
        "attn_logit_softcapping": cfg.attention_softcap,
        "final_logit_softcapping": cfg.logit_softcap,
        "attention.sliding_window": cfg.sliding_window,
    }
    values |= {
        key: value for key, value in options.items() if key in layout.keys and value is not None
    }
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": KINDS[kind],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{layout.gguf}.{key}": value for key, value in values.items()},
    }


def _checked_fields(tokenizer: Any, cfg: ModelConfig) -> dict[str, Any]:
    if len(tokenizer) > cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {cfg.vocab_size}; use its own."
        )
    return tokenizer_fields(tokenizer, cfg.vocab_size)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
