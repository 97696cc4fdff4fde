"""Tiny models whose linear weights somebody else quantized, each beside its dequantized twin."""

import json
from pathlib import Path

import numpy as np
import packers
from safetensors.numpy import load_file, save_file

from jaxlora.ops import nf4
from jaxlora.ops.arrays import DoubleQuantized
from jaxlora.ops.quantize import dequantize, quantize

SHAPE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
_BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": None,
}
_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
    "input_activations": None,
}
CONFIGS = {
    "nf4": _BITSANDBYTES | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": _BITSANDBYTES | {"load_in_8bit": True, "_load_in_4bit": False},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": _GROUP},
        "ignore": ["lm_head"],
    },
}
METHODS = tuple(CONFIGS)


def write(folder: Path, method: str, write_tiny_llama, *, skip=(), **changes) -> tuple[Path, Path]:
    """Returns ``(quantized, twin)``: a repository of `method`, and the numbers it stands for.

    `skip`: parts of tensor names that stay plain, as ``llm_int8_skip_modules`` would leave them.
    """
    plain, quantized = folder / "twin", folder / method
    for each in (plain, quantized):
        write_tiny_llama(each, **{**SHAPE, **changes})
    tensors = load_file(plain / "model.safetensors")
    stored, rng = {}, np.random.default_rng(0)
    for name in sorted(tensors):
        if not name.endswith("_proj.weight") or any(part in name for part in skip):
            stored[name] = tensors[name]
            continue
        parts, matrix = _quantized(method, tensors[name], name, rng)
        stored.update(parts)
        tensors[name] = np.ascontiguousarray(matrix.T.astype(np.float32))
    save_file(tensors, plain / "model.safetensors")
    save_file(stored, quantized / "model.safetensors")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, plain


def _quantized(method, weight, name, rng):
    module = name.removesuffix(".weight")
    if method in ("nf4", "int8"):
        # In our formats, whose bits are bitsandbytes' own (tests/oracle/test_bitsandbytes.py).
        leaf = quantize(weight.T, method)
        parts = _four_bit(name, leaf) if method == "nf4" else _int8(name, module, leaf)
        return parts, np.asarray(dequantize(leaf))
    options = {"desc_act": True} if method == "gptq" else {}
    parts, matrix = getattr(packers, method)(rng, *weight.T.shape, **options)
    return {f"{module}.{part}": value for part, value in parts.items()}, matrix


def _four_bit(name, leaf):
    assert isinstance(leaf.scales, DoubleQuantized)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": leaf.dtype,
        "shape": list(leaf.shape[::-1]),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(leaf.scales.offset),
    }
    return {
        name: leaf.values.reshape(-1, 1),
        f"{name}.absmax": leaf.scales.codes.reshape(-1),
        f"{name}.nested_absmax": leaf.scales.absmax,
        f"{name}.nested_quant_map": nf4.DYNAMIC_MAP,
        f"{name}.quant_map": nf4.CODEBOOK,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ).copy(),
    }


def _int8(name, module, leaf):
    return {
        name: np.ascontiguousarray(leaf.values.T),
        f"{module}.SCB": (leaf.scales[0] * np.float32(127)).astype(np.float16).astype(np.float32),
        f"{module}.weight_format": np.zeros((), np.uint8),
    }
