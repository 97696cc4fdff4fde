"""Weights that bitsandbytes quantized: nf4 and fp4 with their quant_state, and LLM.int8."""

import functools
import json
import math
from typing import Any

import numpy as np

from jaxlora.checkpoints.storage import Part, Shape, Storage, Tensors
from jaxlora.core.errors import UserError
from jaxlora.ops import nf4
from jaxlora.ops.arrays import DoubleQuantized, QuantizedArray

_DTYPES = ("float32", "bfloat16", "float16")
# Tables written on other machines differ from ours in the last place.
_ULPS = 1e-6


def four_bit(format: str) -> Storage:
    """Returns the storage of ``"nf4"`` or ``"fp4"`` weights, double quantized or not."""
    state = "{}.weight.quant_state.bitsandbytes__" + format
    return Storage(
        f"bitsandbytes {format}",
        format,
        state,
        functools.partial(_parts, state),
        functools.partial(_read, format, state),
    )


def _parts(state: str, shape: Shape) -> dict[str, Part]:
    return {
        # bnb_4bit_quant_storage may call the same bytes another dtype.
        "{}.weight": Part(("U8", "BF16", "F16", "F32"), size=-(-math.prod(shape) // 2)),
        "{}.weight.absmax": Part(("U8", "F32")),
        "{}.weight.quant_map": Part(("F32",), (16,)),
        "{}.weight.nested_absmax": Part(("F32",), optional=True),
        "{}.weight.nested_quant_map": Part(("F32",), (256,), optional=True),
        state: Part(("U8",)),
    }


def _read(format: str, state_name: str, parts: Tensors, shape: Shape) -> QuantizedArray:
    in_dim, out_dim = shape
    state = _state(parts[state_name], format, shape)
    if in_dim % 2:
        raise UserError(f"in={in_dim} is odd, so that a byte would belong to two rows; unsupported")
    block = state["blocksize"]
    if in_dim % block and block != nf4.BLOCK:
        raise UserError(f"blocks of {block} cross rows of {in_dim}; supported for {nf4.BLOCK} only")
    _check_table(parts["{}.weight.quant_map"], nf4.TABLES[format], f"{format} quant_map")
    blocks = -(-in_dim * out_dim // block)
    absmax = _sized(parts["{}.weight.absmax"], blocks, "absmax")
    rows = absmax.reshape(out_dim, -1) if in_dim % block == 0 else absmax
    scales: Any = rows
    if absmax.dtype == np.uint8:
        scales = _double(rows, parts, state, blocks)
    elif "nested_offset" in state:
        raise UserError("quant_state speaks of double quantization, absmax is float32")
    packed = parts["{}.weight"]
    values = packed.reshape(-1).view(np.uint8).reshape(out_dim, in_dim // 2)
    return QuantizedArray(values, scales, format, state["dtype"])


def _state(stored: np.ndarray, format: str, shape: Shape) -> dict[str, Any]:
    """The JSON beside a weight, checked against what config.json says of it."""
    try:
        state = json.loads(stored.tobytes().decode("utf-8"))
        block, dtype = int(state["blocksize"]), str(state["dtype"])
        given = tuple(state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"its quant_state is damaged ({error}); download the model again") from None
    if given != shape[::-1]:
        raise UserError(
            f"its quant_state says shape {list(given)}; expected {list(shape[::-1])} by config.json"
        )
    if state.get("quant_type") != format:
        raise UserError(f"its quant_state says {state.get('quant_type')!r}; expected {format!r}")
    if dtype not in _DTYPES or block < 2 or block & (block - 1):
        raise UserError(f"its quant_state says dtype {dtype!r}, blocksize {block}; unsupported")
    return {**state, "blocksize": block}


def _double(codes: np.ndarray, parts: Tensors, state: dict, blocks: int) -> DoubleQuantized:
    table = parts["{}.weight.nested_quant_map"]
    if state.get("nested_blocksize") != nf4.NESTED_BLOCK or table is None:
        raise UserError(
            f"double quantization in blocks of {state.get('nested_blocksize')}; expected "
            f"{nf4.NESTED_BLOCK} and a nested_quant_map"
        )
    absmax = _sized(
        parts["{}.weight.nested_absmax"], -(-blocks // nf4.NESTED_BLOCK), "nested_absmax"
    )
    offset = np.asarray(state.get("nested_offset"), np.float32)
    same = np.array_equal(table, nf4.DYNAMIC_MAP)
    return DoubleQuantized(codes, absmax, offset, None if same else table)


def _sized(tensor: np.ndarray | None, size: int, name: str) -> np.ndarray:
    if tensor is None or tensor.size != size:
        got = "is missing" if tensor is None else f"has {tensor.size} numbers"
        raise UserError(f"its {name} {got}; expected {size}")
    return tensor.reshape(-1)


def _check_table(stored: np.ndarray | None, table: np.ndarray, name: str) -> None:
    if stored is None or not np.allclose(stored, table, rtol=0, atol=_ULPS):
        raise UserError(f"its {name} is another table than bitsandbytes'; unsupported")


def _int8_parts(shape: Shape) -> dict[str, Part]:
    return {
        "{}.weight": Part(("I8",), shape[::-1]),
        "{}.SCB": Part(("F32", "F16"), shape[1:]),
        "{}.weight_format": Part(("U8", "I8"), optional=True),
    }


def _read_int8(parts: Tensors, shape: Shape) -> QuantizedArray:
    values, largest, layout = (parts[name] for name in _int8_parts(shape))
    if layout is not None and layout.reshape(-1).any():
        raise UserError(
            f"weight_format is {layout.reshape(-1)[0]}, a GPU's tiles; expected 0 (row-major); "
            "save the model again with a current bitsandbytes"
        )
    scales = largest.astype(np.float32)[None] / np.float32(127)
    # LLM.int8 multiplies in int8 and scales in float32: its weight is never rounded to 16 bits.
    return QuantizedArray(values.T, scales, "int8", "float32")


LLM_INT8 = Storage("bitsandbytes int8", "int8", "{}.SCB", _int8_parts, _read_int8)
