"""Weights are an algebra of leaves: plain, quantized, patched, or with a LoRA pair on top.

A leaf stands for one logical matrix of shape ``[..., in, out]``; leading axes are stacked layers,
which `jax.lax.scan` slices off. The model calls `jaxlora.ops.matmul` and never sees which it has.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8, UInt32

# Frozen storage is numpy on the host until the loader has placed it on the devices.
Stored = Array | np.ndarray

# Formats whose values are indices into a table of 16 numbers, stored [out, in / 2].
CODED = frozenset({"nf4", "fp4", "mxfp4"})
FOUR_BIT = CODED | {"int4"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoubleQuantized:
    """Block scales that are themselves quantized (QLoRA, Dettmers et al. 2023, section 3).

    ``scale = map[codes] * absmax[block of 256] + offset`` with bitsandbytes' signed dynamic map;
    `map` is None where it is the one of `jaxlora.ops.nf4`, bit for bit.
    """

    codes: UInt8[Stored, "*blocks"]
    absmax: Float[Stored, "*lead nested_blocks"]
    offset: Float[Stored, "*lead"]
    map: Float[Stored, "*lead 256"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A matrix ``[..., in, out]`` stored in 4 or 8 bits; `jaxlora.ops.quantize` makes and reads it.

    Attributes:
      values: int4 and int8: ``[..., in, out]`` signed integers. The rest: ``[..., out, in / 2]``
        uint8, two codes a byte, first element in the high nibble (bitsandbytes' bytes in order).
      scales: int4: ``[..., in / group, out]``. int8: the same, or ``[..., 1, out]``, or
        ``[in, 1]`` for an embedding, whose ``in`` counts tokens: a lookup needs theirs alone.
        The rest: ``[..., out, in / block]`` when the block divides ``in``, else one scale per 64
        elements of the flattened matrix.
      format: ``"int4"``, ``"int8"``, or one of `CODED`, which name a table in `nf4.TABLES`.
      dtype: name of the dtype it stands for, e.g. ``"bfloat16"``: however it is read, its numbers
        are ones of that dtype.
      gathered: sharding of values and scales just before they are dequantized, so that the
        all-gather of a sharded base moves packed bits; None leaves it to the compiler.
      zeros: int4 and int8: ``[..., in / group, out]`` integers that stand for zero; None for 0.
      groups: int4 and int8: ``[..., in]`` group of each input (GPTQ's ``g_idx``); None where the
        groups are runs of inputs.
      packed: int4 on the way to a device: values are ``[..., in / 2, out]`` uint8, the even input
        in the low nibble, because numpy spends a byte on an int4.
      kernel: what dequantizes it: ``""`` for XLA, ``"tpu"`` for `jaxlora.ops.dequantize_tpu`,
        ``"interpret"`` for the same kernel in Python (tests). With a kernel the values of `CODED`
        formats are ``[..., in, out]`` uint4.
      product: whether products with many tokens unpack it as they go (`jaxlora.ops.product_tpu`);
        only with a kernel, on one device.
    """

    values: Any
    scales: Float[Stored, "..."] | DoubleQuantized
    format: str = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    gathered: Any = dataclasses.field(default=None, metadata={"static": True})
    zeros: Int[Stored, "..."] | None = None
    groups: Int[Stored, "..."] | None = None
    packed: bool = dataclasses.field(default=False, metadata={"static": True})
    kernel: str = dataclasses.field(default="", metadata={"static": True})
    product: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``[..., in, out]``."""
        *lead, rows, columns = self.values.shape
        if self.format in CODED and not self.kernel:
            return (*lead, 2 * columns, rows)
        return (*lead, 2 * rows if self.packed else rows, columns)

    @property
    def ndim(self) -> int:
        return len(self.shape)


def take_rows(table: Num[Array, "..."], index: Int[Array, "*lead M"]) -> Num[Array, "..."]:
    """Returns ``table[index]``, ``[*lead, N, ...] -> [*lead, M, ...]``, within each leading index.

    >>> take_rows(jnp.arange(6.0).reshape(2, 3), jnp.array([[2, 0], [1, 1]])).tolist()
    [[2.0, 0.0], [4.0, 4.0]]
    """

    def take(rows, at):
        return jnp.take(rows, at, axis=0)

    for _ in range(index.ndim - 1):
        take = jax.vmap(take)
    return take(table, index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraArray:
    """``base + scale * a @ b`` without ever forming the sum (LoRA, Hu et al. 2021).

    Attributes:
      base: frozen ``[..., in, out]``, a plain array or a `QuantizedArray`.
      a: ``[..., in, R]`` float32.
      b: ``[..., R, out]`` float32.
      scale: ``[...]`` float32: alpha / r, or alpha / sqrt(r) for rsLoRA.
      magnitude: ``[..., out]`` for DoRA (Liu et al. 2024), else None.
      key: ``[..., 2]`` raw uint32 PRNG key; None switches dropout off (evaluation).
      dropout: probability that an input of the low-rank path is dropped.
      bias: ``[..., out]``, scaled and added to the product; None for nearly every adapter.
      gathered: shardings of one layer's `a` and `b` just before they are multiplied by, so that a
        pair that is split over devices is gathered and not the tokens moved; None leaves it to
        the compiler.
    """

    base: Any
    a: Float[Array, "*lead I R"]
    b: Float[Array, "*lead R O"]
    scale: Float[Array, "*lead"]
    magnitude: Float[Array, "*lead O"] | None = None
    key: UInt32[Array, "*lead 2"] | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    bias: Float[Array, "*lead O"] | None = None
    gathered: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.base.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchedArray:
    """A weight of which some rows, columns or layers are other numbers: those that train.

    Attributes:
      base: the frozen whole, a plain array.
      patch: what stands at `index` of `axis` instead; None while it is a hole to be filled.
      index: ``[n]`` int32, ascending.
      axis: axis of `base` that `index` counts.
      by_token: whether `base` is the vocabulary's table or head, whose rows are looked up one by
        one, so that neither the patched whole nor its gradient is ever formed.
    """

    base: Any
    patch: Any
    index: Int[Stored, "n"]
    axis: int = dataclasses.field(metadata={"static": True})
    by_token: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype


Weight = jax.Array | QuantizedArray | LoraArray | PatchedArray
