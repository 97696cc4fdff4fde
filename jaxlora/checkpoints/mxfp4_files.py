"""MXFP4 (OCP Microscaling Formats v1.0): how gpt-oss stores its experts.

``*_blocks`` holds two numbers a byte, the first in the low nibble, in blocks of 32 inputs;
``*_scales`` each block's power of two.
"""

import numpy as np

from jaxlora.checkpoints.storage import Part, Shape, Storage, Tensors
from jaxlora.core.errors import UserError
from jaxlora.ops.arrays import QuantizedArray

_BLOCK = 32
_EXPONENT_BIAS = 127
_NOT_A_NUMBER = 255


def _parts(shape: Shape) -> dict[str, Part]:
    experts, in_dim, out_dim = shape
    blocks = -(-in_dim // _BLOCK)
    return {
        "{}_blocks": Part(("U8",), (experts, out_dim, blocks, _BLOCK // 2)),
        "{}_scales": Part(("U8",), (experts, out_dim, blocks)),
    }


def _read(tensors: Tensors, shape: Shape) -> QuantizedArray:
    blocks, scales = tensors["{}_blocks"], tensors["{}_scales"]
    if (scales == _NOT_A_NUMBER).any():
        raise UserError("a scale is not a number; download the model again")
    # Our codes have the first number of a pair in the high nibble.
    values = (blocks << np.uint8(4) | blocks >> np.uint8(4)).reshape(*scales.shape[:2], -1)
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - _EXPONENT_BIAS)
    return QuantizedArray(values, powers, "mxfp4", "bfloat16")


MXFP4 = Storage("MXFP4", "mxfp4", "{}_blocks", _parts, _read, axes=3)
