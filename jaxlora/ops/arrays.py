"""Weights are an algebra of leaves: plain, quantized, or either of them with a LoRA pair on top.

A leaf stands for one logical matrix of shape ``[..., in, out]``; leading axes are stacked layers,
which `jax.lax.scan` slices off. The model calls `jaxlora.ops.matmul` and never sees which it has.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

# Frozen storage is numpy on the host until the loader has placed it on the devices.
Stored = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoubleQuantized:
    """Block scales that are themselves quantized (QLoRA, Dettmers et al. 2023, section 3).

    ``scale = map[codes] * absmax[block of 256] + offset`` with bitsandbytes' signed dynamic map.
    """

    codes: UInt8[Stored, "*blocks"]
    absmax: Float[Stored, "*lead nested_blocks"]
    offset: Float[Stored, "*lead"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A matrix ``[..., in, out]`` stored in 4 or 8 bits; `jaxlora.ops.quantize` makes and reads it.

    Attributes:
      values: int4 and int8: ``[..., in, out]`` signed integers. nf4: ``[..., out, in / 2]`` uint8,
        two codes a byte, first element in the high nibble (bitsandbytes' bytes in its order).
      scales: int4: ``[..., in / group, out]``. int8: ``[..., 1, out]``.
        nf4: ``[..., out, in / 64]`` when 64 divides ``in``, else one scale per 64
        elements of the flattened matrix.
      format: ``"int4"``, ``"nf4"`` or ``"int8"``.
      dtype: name of the dtype it stands for, e.g. ``"bfloat16"``.
      gathered: sharding of values and scales just before they are dequantized, so that the
        all-gather of a sharded base moves packed bits; None leaves it to the compiler.
    """

    values: Any
    scales: Float[Stored, "..."] | DoubleQuantized
    format: str = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    gathered: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``[..., in, out]``."""
        if self.format == "nf4":
            *lead, out_dim, half = self.values.shape
            return (*lead, 2 * half, out_dim)
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)


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
    """

    base: Any
    a: Float[Array, "*lead I R"]
    b: Float[Array, "*lead R O"]
    scale: Float[Array, "*lead"]
    magnitude: Float[Array, "*lead O"] | None = None
    key: UInt32[Array, "*lead 2"] | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.base.shape)


Weight = jax.Array | QuantizedArray | LoraArray
