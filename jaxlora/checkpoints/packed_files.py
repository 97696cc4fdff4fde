"""Weights packed into 32-bit words with a scale and a zero point for each group of inputs.

GPTQ (Frantar et al. 2023), AWQ (Lin et al. 2024) and compressed-tensors' ``pack-quantized`` differ
in which way the words run and in the order within a word; the numbers mean the same:
``(value - zero) * scale``.
"""

import numpy as np

from jaxlora.checkpoints.storage import Part, Shape, Storage, Tensors
from jaxlora.core.errors import UserError
from jaxlora.ops import integer
from jaxlora.ops.arrays import QuantizedArray

# Output that each nibble of an AWQ word holds, lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("F16", "BF16", "F32")


def _groups(in_dim: int, group_size: int) -> int:
    """Number of groups; -1 means one for all inputs."""
    return 1 if group_size == -1 else -(-in_dim // group_size)


def _by_input(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values ``[in, out]`` from words that run along the rows."""
    rows, columns = words.shape
    octets = words.view(np.uint8).reshape(rows, columns, 4).swapaxes(1, 2)
    return _octets_apart(octets.reshape(rows * 4, columns), bits)


def _octets_apart(octets: np.ndarray, bits: int) -> np.ndarray:
    """``[n, out]`` bytes to ``[n * 8 / bits, out]`` values, lowest bits first."""
    if bits == 8:
        return octets
    pairs = np.stack([octets & np.uint8(15), octets >> np.uint8(4)], axis=1)
    return pairs.reshape(-1, octets.shape[1])


def _leaf(
    octets: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    groups: np.ndarray | None,
    bits: int,
) -> QuantizedArray:
    """A host leaf from ``[in * bits / 8, out]`` bytes of unsigned values, lowest bits first."""
    # Flipping the highest bit of an unsigned value is subtracting half the range.
    flipped = octets ^ np.uint8(0x88 if bits == 4 else 0x80)
    values = flipped if bits == 4 else flipped.view(np.int8)
    if zeros is not None:
        zeros = (zeros.astype(np.int16) - (1 << bits - 1)).astype(
            np.int8 if bits == 4 else np.int16
        )
    return QuantizedArray(
        values,
        scales,
        f"int{bits}",
        scales.dtype.name,
        zeros=zeros,
        groups=groups,
        packed=bits == 4,
    )


def _order(
    stored: np.ndarray | None, in_dim: int, group_size: int, keep: bool
) -> np.ndarray | None:
    """Group of each input, None where they are equal runs and need not be kept."""
    length = in_dim if group_size == -1 else group_size
    runs = np.arange(in_dim, dtype=np.int32) // length
    if stored is None:
        stored = runs
    elif stored.min() < 0 or stored.max() > runs[-1]:
        raise UserError(f"its g_idx has groups outside 0 to {runs[-1]}; download the model again")
    if not keep and in_dim % length == 0 and np.array_equal(stored, runs):
        return None
    return stored.astype(np.int32)


def gptq(bits: int, group_size: int, *, desc_act: bool, zero_offset: int) -> Storage:
    """Returns GPTQ's storage.

    Args:
      bits: 4 or 8.
      group_size: inputs in a group, -1 for all.
      desc_act: inputs were quantized in order of importance, so a group's lie anywhere.
      zero_offset: what the files' zero points lack: 1 in format "gptq", 0 in "gptq_v2".
    """
    each = 32 // bits

    def parts(shape: Shape) -> dict[str, Part]:
        in_dim, out_dim = shape
        groups = _groups(in_dim, group_size)
        return {
            "{}.qweight": Part(("I32",), (in_dim // each, out_dim)),
            "{}.qzeros": Part(("I32",), (groups, out_dim // each)),
            "{}.scales": Part(_FLOATS, (groups, out_dim)),
            "{}.g_idx": Part(("I32",), (in_dim,), optional=True),
        }

    def read(tensors: Tensors, shape: Shape) -> QuantizedArray:
        words, packed_zeros, scales, g_idx = (tensors[name] for name in parts(shape))
        zeros = _by_input(np.ascontiguousarray(packed_zeros.T), bits).T
        # Where the sum does not fit, the file's zero point was 0 and wrapped round when stored.
        zeros = zeros + np.uint8(zero_offset) & np.uint8((1 << bits) - 1)
        rows, columns = words.shape
        octets = words.view(np.uint8).reshape(rows, columns, 4).swapaxes(1, 2)
        groups = _order(g_idx, shape[0], group_size, desc_act)
        return _leaf(octets.reshape(rows * 4, columns), scales, zeros, groups, bits)

    name = f"GPTQ {bits}-bit, group size {group_size}"
    return Storage(name, f"int{bits}", "{}.qweight", parts, read)


def awq(group_size: int) -> Storage:
    """Returns AWQ's 4-bit storage in its "gemm" layout; `group_size` as for `gptq`."""

    def parts(shape: Shape) -> dict[str, Part]:
        in_dim, out_dim = shape
        groups = _groups(in_dim, group_size)
        return {
            "{}.qweight": Part(("I32",), (in_dim, out_dim // 8)),
            "{}.qzeros": Part(("I32",), (groups, out_dim // 8)),
            "{}.scales": Part(_FLOATS, (groups, out_dim)),
        }

    def read(tensors: Tensors, shape: Shape) -> QuantizedArray:
        words, zeros, scales = (tensors[name] for name in parts(shape))
        groups = _order(None, shape[0], group_size, False)
        octets = integer.pack(_awq_values(words))
        return _leaf(octets, scales, _awq_values(zeros), groups, 4)

    return Storage(f"AWQ 4-bit, group size {group_size}", "int4", "{}.qweight", parts, read)


def _awq_values(words: np.ndarray) -> np.ndarray:
    """Unsigned values ``[rows, out]`` from AWQ's words along the outputs."""
    rows, columns = words.shape
    unsigned = words.view(np.uint32)
    values = np.empty((rows, columns, 8), np.uint8)
    for nibble, output in enumerate(_AWQ_ORDER):
        values[..., output] = (unsigned >> np.uint32(4 * nibble)) & np.uint32(15)
    return values.reshape(rows, columns * 8)


def compressed_tensors(bits: int, group_size: int, *, symmetric: bool, ordered: bool) -> Storage:
    """Returns the storage of compressed-tensors' ``pack-quantized`` (vLLM's llm-compressor).

    Args:
      bits: 4 or 8.
      group_size: as for `gptq`.
      symmetric: without zero points.
      ordered: activation order: groups by ``weight_g_idx``.
    """
    each = 32 // bits

    def parts(shape: Shape) -> dict[str, Part]:
        in_dim, out_dim = shape
        groups = _groups(in_dim, group_size)
        wanted = {
            "{}.weight_packed": Part(("I32",), (out_dim, -(-in_dim // each))),
            "{}.weight_scale": Part(_FLOATS, (out_dim, groups)),
            "{}.weight_shape": Part(("I64", "I32"), (2,), optional=True),
            "{}.weight_g_idx": Part(("I32", "I64"), (in_dim,), optional=not ordered),
        }
        if not symmetric:
            wanted["{}.weight_zero_point"] = Part(("I32",), (-(-out_dim // each), groups))
        return wanted

    def read(tensors: Tensors, shape: Shape) -> QuantizedArray:
        in_dim, out_dim = shape
        words, scales = tensors["{}.weight_packed"], tensors["{}.weight_scale"]
        stored = tensors["{}.weight_shape"]
        if stored is not None and tuple(stored) != (out_dim, in_dim):
            raise UserError(f"its weight_shape is {stored.tolist()}; expected {[out_dim, in_dim]}")
        if in_dim % each or out_dim % each:
            raise UserError(
                f"{out_dim} x {in_dim} does not fill words of {each} values; unsupported"
            )
        zeros = None
        if not symmetric:
            zeros = np.ascontiguousarray(_by_input(tensors["{}.weight_zero_point"], bits).T)
        groups = _order(tensors["{}.weight_g_idx"], in_dim, group_size, ordered)
        octets = np.ascontiguousarray(words.view(np.uint8).T)
        return _leaf(octets, np.ascontiguousarray(scales.T), zeros, groups, bits)

    name = f"compressed-tensors {bits}-bit, group size {group_size}"
    return Storage(name, f"int{bits}", "{}.weight_packed", parts, read)
