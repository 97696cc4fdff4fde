"""Quantize a matrix to 4 or 8 bits and read it back; the formats are in `nf4` and `integer`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.ops import dequantize_tpu, integer, nf4, product_tpu
from jaxlora.ops.arrays import CODED, DoubleQuantized, QuantizedArray

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


def quantize_tokens(
    table: Float[np.ndarray, "V D"] | Float[np.ndarray, "D V"], axis: int
) -> QuantizedArray:
    """Quantizes an embedding or a head on the host: int8, one scale for each token.

    It stands for float32 numbers, code times scale, whatever the dtype of `table`.

    Args:
      table: any floating dtype; non-finite values and the range of float16 are checked.
      axis: the one that counts tokens: 0 of an embedding, 1 of a head.

    Raises:
      UserError: as `quantize`.

    >>> leaf = quantize_tokens(np.array([[1.0, -0.5], [2.0, 2.0]], "float32"), 0)
    >>> leaf.values.tolist(), leaf.scales.shape
    ([[127, -64], [127, 127]], (2, 1))
    """
    leaf: Any = quantize(table if axis else table.T, "int8")
    if axis:
        return leaf
    return dataclasses.replace(leaf, values=leaf.values.T, scales=leaf.scales.T)


def dequantize(quantized: QuantizedArray, dtype: Any = None) -> Float[Array, "*lead I O"]:
    """Returns the matrix that `quantized` stores, as `dtype` or its own; jittable.

    Numbers are rounded to its own dtype first: the matrix is the same however it is read.

    >>> dequantize(quantize(np.eye(2, dtype="float32"), "int8"))[0].tolist()
    [1.0, 0.0]
    """
    leaf: Any = gather(quantized)  # arrays of jax throughout
    values, scales = leaf.values, leaf.scales
    if quantized.kernel and values.ndim == 2:
        matrix = _by_kernel(leaf)
    elif quantized.format in CODED:
        table = nf4.TABLES[quantized.format]
        read = nf4.dequantize_by_input if quantized.kernel else nf4.dequantize
        matrix = read(values, scales, quantized.dtype, table=table)
        if leaf.gathered is not None and leaf.gathered[0] is not None and not quantized.kernel:
            # As its codes lie: the compiler would split the numbers as it splits what they are
            # multiplied by, and gather them again.
            rows = jax.lax.with_sharding_constraint(matrix.swapaxes(-1, -2), leaf.gathered[0])
            matrix = rows.swapaxes(-1, -2)
    else:
        if quantized.packed:
            values = integer.unpack(values)
        matrix = _as_stored(
            integer.dequantize(
                values, scales, quantized.dtype, zeros=leaf.zeros, groups=leaf.groups
            )
        )
    return matrix if dtype is None else matrix.astype(dtype)


def _as_stored(matrix: jax.Array) -> jax.Array:
    """Returns `matrix`, on a GPU laid out row after row, as its codes are.

    Products there want their inner axis last. XLA lays the codes out so, before the loop over
    layers, and keeps that copy of all of them (Llama 3 70B in int4: 32 GB).
    """

    if not isinstance(matrix, Tracer):
        return matrix  # there is no loop

    def laid_out(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(matrix, cuda=laid_out, default=lambda x: x)


def _by_kernel(leaf: Any) -> Float[Array, "I O"]:
    return dequantize_tpu.dequantize(
        leaf.values,
        _scales_for_kernel(leaf),
        leaf.dtype,
        table=nf4.TABLES.get(leaf.format),
        # The compiler cannot split a kernel: each device of a mesh is given its own part.
        sharding=None if leaf.gathered is None else leaf.gathered[0],
        interpret=leaf.kernel == "interpret",
    )


def _scales_for_kernel(leaf: Any) -> Float[Array, "groups O"]:
    return nf4.scales_by_input(leaf.scales) if leaf.format in CODED else leaf.scales


def multiplies(x: Float[Array, "*batch I"], quantized: QuantizedArray, rank: int = 0) -> bool:
    """Returns whether `multiply` serves for an input, or a gradient, and a pair of a rank."""
    groups = dequantize_tpu.groups_of(quantized) if quantized.product else None
    if groups is None or quantized.ndim != 2:
        return False
    if not x.dtype == jnp.dtype(quantized.dtype) == jnp.bfloat16:
        return False
    shape, tokens = quantized.shape, math.prod(x.shape[:-1])
    return product_tpu.serves(tokens, (shape[0], shape[1]), shape[0] // groups, rank)


def multiply(
    x: Float[Array, "*batch I"],
    quantized: QuantizedArray,
    pair: tuple[Float[Array, "*batch R"], Float[Array, "..."]] | None = None,
    *,
    turned: bool = False,
) -> Float[Array, "*batch O"]:
    """Returns ``x @ W + h @ b`` by a kernel that unpacks W as it multiplies, see `product_tpu`."""
    leaf: Any = jax.tree.map(jnp.asarray, quantized)
    flat = x.reshape(-1, x.shape[-1])
    y = product_tpu.product(
        flat,
        leaf.values,
        _scales_for_kernel(leaf),
        None if pair is None else (pair[0].reshape(len(flat), -1), pair[1]),
        table=nf4.TABLES.get(leaf.format),
        turned=turned,
        interpret=leaf.kernel == "interpret",
    )
    return y.reshape(*x.shape[:-1], -1)


def gather(quantized: QuantizedArray) -> QuantizedArray:
    """Returns all parts as jax arrays, constrained to the sharding `gathered` asks for.

    Flat nf4 scales and int4 groups have no axis in common with the matrix and are left alone.
    """
    leaf = jax.tree.map(jnp.asarray, quantized)
    if leaf.gathered is None:
        return leaf
    for_values, for_scales = leaf.gathered
    values, ndim = leaf.values, leaf.values.ndim

    def constrain(part: Any) -> Any:
        if part is None or part.ndim != ndim or for_scales is None:
            return part
        return jax.lax.with_sharding_constraint(part, for_scales)

    if for_values is not None:
        values = jax.lax.with_sharding_constraint(values, for_values)
    scales, zeros = leaf.scales, constrain(leaf.zeros)
    if isinstance(scales, DoubleQuantized):
        scales = dataclasses.replace(scales, codes=constrain(scales.codes))
    else:
        scales = constrain(scales)
    return dataclasses.replace(leaf, values=values, scales=scales, zeros=zeros)


def bits_per_parameter(quantized: QuantizedArray) -> float:
    """Returns the storage of values, scales and zeros in bits, per element of the matrix.

    >>> bits_per_parameter(quantize(np.ones((128, 128), "float32"), "int4"))
    4.25
    """
    leaves = jax.tree.leaves(quantized)
    return sum(leaf.size * _bits(leaf.dtype) for leaf in leaves) / math.prod(quantized.shape)


def _bits(dtype: Any) -> int:
    kind = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return kind(dtype).bits


def pack(quantized: QuantizedArray) -> QuantizedArray:
    """Returns a host leaf with int4 values two a byte; other leaves as they are."""
    if quantized.format != "int4" or quantized.packed or quantized.values.shape[-2] % 2:
        return quantized
    return dataclasses.replace(quantized, values=integer.pack(quantized.values), packed=True)


@jax.jit
def unpack(quantized: QuantizedArray) -> QuantizedArray:
    """Returns a leaf on a device with int4 values as the device's own int4."""
    if not quantized.packed:
        return quantized
    return dataclasses.replace(quantized, values=integer.unpack(quantized.values), packed=False)


def beside(left: QuantizedArray, right: QuantizedArray) -> QuantizedArray:
    """Returns the host leaf of two matrices side by side, ``[in, out + out']``.

    Raises:
      UserError: they are stored in unlike ways, or their scales belong to no row.
    """
    by_row = not isinstance(left.scales, DoubleQuantized) and left.scales.ndim == left.values.ndim
    alike = jax.tree.structure(left) == jax.tree.structure(right)
    groups: list[Any] = [left.groups, right.groups]
    if not (by_row and alike and np.array_equal(*groups)):
        raise UserError("matrices quantized apart cannot be joined to one; use the plain model")
    axis = -2 if left.format in CODED else -1
    joined = {
        name: np.concatenate([getattr(left, name), getattr(right, name)], axis=axis)
        for name in ("values", "scales", "zeros")
        if getattr(left, name) is not None
    }
    return dataclasses.replace(left, **joined)
