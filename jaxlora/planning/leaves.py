"""The arrays of a run as shapes: what `training.state` will put on the devices."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.checkpoints.load import QuantSpec
from jaxlora.checkpoints.matrices import is_table
from jaxlora.core.axes import VOCAB
from jaxlora.models.parameters import ParamSpec
from jaxlora.ops.arrays import CODED, DoubleQuantized, QuantizedArray
from jaxlora.ops.integer import group_length
from jaxlora.ops.nf4 import BLOCK, NESTED_BLOCK
from jaxlora.training.shape import Shape


def note(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Puts nothing anywhere: the `put` of a `Placement` that plans."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def frozen_leaves(shape: Shape, quantization: QuantSpec | None) -> dict[str, Any]:
    """Returns ``{path: leaf}`` of what does not train, shapes and shardings in place of arrays.

    Args:
      shape: of the run; its placement notes (`note`) where arrays go.
      quantization: how the base is stored.
    """
    leaves = {}
    for path, spec in shape.specs.items():
        part = shape.parts.get(path)
        if part is not None and part.whole:
            continue
        stored = None if part is not None else quantization
        leaf = host_leaf(spec, stored, jnp.dtype(shape.transformer.dtype))
        leaf = shape.placement.weight(leaf, spec.axes, stacked=spec.layers is not None)
        if part is not None:
            hole = part.hole(leaf)
            index: Any = note(hole.index, shape.placement.sharding((None,), hole.index.shape))
            leaf = dataclasses.replace(hole, index=index)
        leaves[path] = leaf
    return leaves


def host_leaf(spec: ParamSpec, quantization: QuantSpec | None, dtype: jnp.dtype) -> Any:
    """A leaf as it is before it is placed."""
    format = None if quantization is None else quantization.of(spec)
    if quantization is None or format is None:
        # Buffers keep their precision.
        return _array(spec.full_shape, jnp.float32 if spec.kind == "buffer" else dtype)
    if is_table(spec):
        scales = tuple(
            size if axis == VOCAB else 1 for size, axis in zip(spec.shape, spec.axes, strict=True)
        )
        values: Any = _array(spec.shape, jnp.int8)
        return QuantizedArray(values, _array(scales, jnp.float32), format, "float32")  # type: ignore[arg-type]
    return _quantized(spec.full_shape, quantization, dtype)


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _quantized(shape: tuple[int, ...], how: QuantSpec, dtype: jnp.dtype) -> QuantizedArray:
    """What `ops.quantize.quantize` makes of each ``[in, out]`` of a stack."""
    *lead, in_dim, out_dim = shape
    if how.format in CODED:
        values = _array((*lead, out_dim, in_dim // 2), jnp.uint8)
        by_row = in_dim % BLOCK == 0
        blocks = (out_dim, in_dim // BLOCK) if by_row else (-(-out_dim * in_dim // BLOCK),)
        scales = _array((*lead, *blocks), jnp.float32)
        if how.double_quant:
            nested = -(-math.prod(blocks) // NESTED_BLOCK)
            scales = DoubleQuantized(
                _array((*lead, *blocks), jnp.uint8),  # type: ignore[arg-type]
                _array((*lead, nested), jnp.float32),  # type: ignore[arg-type]
                _array(tuple(lead), jnp.float32),  # type: ignore[arg-type]
            )
    else:
        values = _array(shape, jnp.int4 if how.format == "int4" else jnp.int8)
        groups = in_dim // group_length(in_dim, how.group_size) if how.format == "int4" else 1
        kind = jnp.bfloat16 if how.format == "int4" else jnp.float32
        scales = _array((*lead, groups, out_dim), kind)
    return QuantizedArray(values, scales, how.format, dtype.name)  # type: ignore[arg-type]


def trained_leaves(shape: Shape, pairs: dict[str, Any]) -> dict[str, Any]:
    """Returns what trains, ``{"params": .., "adapter": ..}``, as shapes; all of it float32.

    Args:
      shape: of the run.
      pairs: shapes of the low-rank pairs.
    """
    put = shape.placement
    params = {}
    for path, part in shape.parts.items():
        spec = shape.specs[path]
        values = _array(part.shape(spec.full_shape), jnp.float32)
        params[path] = put.weight(values, part.axes(spec.axes), stacked=part.stacked)
    adapter = {
        path: put.adapter(pair, shape.specs[path].axes, stacked=shape.targets[path].stacked)
        for path, pair in pairs.items()
    }
    return {"params": params, "adapter": adapter}
