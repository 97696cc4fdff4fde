"""Quantize a matrix to 4 or 8 bits and read it back; the formats are in `nf4` and `integer`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.ops import integer, nf4
from jaxlora.ops.arrays import DoubleQuantized, QuantizedArray

FORMATS = ("int4", "nf4", "int8")


def quantize(
    weight: Float[np.ndarray, "I O"] | Float[Array, "I O"],
    format: str,
    *,
    group_size: int = 64,
    double_quant: bool = True,
    dtype: str = "float32",
) -> QuantizedArray:
    """Quantizes one matrix on the host; the leaves of the result are numpy arrays.

    Fastest for a weight whose transpose is contiguous, as that of a HF ``[out, in]`` tensor is.

    Args:
      weight: any floating dtype, bfloat16 included.
      format: one of `FORMATS`.
      group_size: int4 only: inputs that share a scale; see `integer.group_length`.
      double_quant: nf4 only: quantize the block scales too.
      dtype: name of the dtype that `dequantize` gives back.

    Raises:
      UserError: unknown format, non-finite values, or a shape or range the format cannot hold.

    >>> quantize(np.eye(64, dtype="float32"), "int4").shape
    (64, 64)
    """
    if format not in FORMATS:
        hint = did_you_mean(format, FORMATS)
        raise UserError(f'quantization "{format}" is not one of {", ".join(FORMATS)}.{hint}')
    matrix = np.asarray(weight)
    assert matrix.ndim == 2, matrix.shape
    assert jnp.issubdtype(matrix.dtype, jnp.floating), matrix.dtype
    # NaN and infinity pass through every format into the scales, where looking for them is cheap.
    if format == "nf4":
        values, scales = nf4.quantize(matrix, double_quant=double_quant)
    elif format == "int4":
        values, scales = integer.quantize_int4(matrix, group_size=group_size)
    else:
        values, scales = integer.quantize_int8(matrix)
    if not np.isfinite(scales.offset if isinstance(scales, DoubleQuantized) else scales).all():
        raise UserError("non-finite values (NaN or infinity) cannot be quantized; mend the weight.")
    return QuantizedArray(values, scales, format=format, dtype=jnp.dtype(dtype).name)


def dequantize(quantized: QuantizedArray, dtype: Any = None) -> Float[Array, "*lead I O"]:
    """Returns the matrix that `quantized` stores, as `dtype` or its own; jittable.

    >>> dequantize(quantize(np.eye(2, dtype="float32"), "int8"))[0].tolist()
    [1.0, 0.0]
    """
    values, scales = _gather(quantized)
    read = nf4.dequantize if quantized.format == "nf4" else integer.dequantize
    return read(values, scales, dtype or quantized.dtype)


def _gather(quantized: QuantizedArray) -> tuple[Any, Any]:
    """Values and scales as jax arrays, constrained to the sharding `gathered` asks for.

    Flat nf4 scales have no axis in common with the matrix and are left alone.
    """
    values, scales = jax.tree.map(jnp.asarray, (quantized.values, quantized.scales))
    if quantized.gathered is None:
        return values, scales
    for_values, for_scales = quantized.gathered
    if for_values is not None:
        values = jax.lax.with_sharding_constraint(values, for_values)
    if for_scales is None:
        return values, scales
    if isinstance(scales, DoubleQuantized):
        if scales.codes.ndim == values.ndim:
            codes = jax.lax.with_sharding_constraint(scales.codes, for_scales)
            scales = DoubleQuantized(codes, scales.absmax, scales.offset)
    elif scales.ndim == values.ndim:
        scales = jax.lax.with_sharding_constraint(scales, for_scales)
    return values, scales


def bits_per_parameter(quantized: QuantizedArray) -> float:
    """Returns the storage of values and scales in bits, per element of the matrix.

    >>> bits_per_parameter(quantize(np.ones((128, 128), "float32"), "int4"))
    4.5
    """
    leaves = jax.tree.leaves((quantized.values, quantized.scales))
    return sum(leaf.size * _bits(leaf.dtype) for leaf in leaves) / math.prod(quantized.shape)


def _bits(dtype: Any) -> int:
    kind = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return kind(dtype).bits
