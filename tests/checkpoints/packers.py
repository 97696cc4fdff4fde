"""Weights as GPTQ, AWQ and compressed-tensors write them, from the published layouts, bit by bit.

Each packer returns the tensors of one linear layer and the ``[in, out]`` matrix they stand for, in
the dtype and with the rounding of the format's own dequantization.
"""

import ml_dtypes
import numpy as np

# Output that each nibble of an AWQ word holds, lowest first (awq/utils/packing_utils.py).
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def _words(values, bits):
    """Packs along the first axis: value i into bits ``bits * (i % n)`` of word ``i // n``."""
    each = 32 // bits
    words = np.zeros((values.shape[0] // each, values.shape[1]), np.uint32)
    for row in range(values.shape[0]):
        words[row // each] |= values[row].astype(np.uint32) << np.uint32(bits * (row % each))
    return words.view(np.int32)


def _random(rng, in_dim, out_dim, groups, bits, dtype):
    top = 1 << bits
    values = rng.integers(0, top, (in_dim, out_dim), dtype=np.uint32)
    # About 1 / sqrt(in): a model of such matrices keeps its activations near 1.
    spread = 3.0 / (top * in_dim**0.5)
    scales = (spread * rng.uniform(0.5, 1.5, (groups, out_dim))).astype(dtype)
    return values, scales


def _read(values, zeros, scales, group_of, dtype):
    difference = values.astype(np.int32) - zeros[group_of].astype(np.int32)
    product = scales[group_of].astype(np.float32) * difference.astype(np.float32)
    return product.astype(dtype)  # an exact product, so rounded once as in 16-bit arithmetic


def gptq(
    rng, in_dim, out_dim, *, group_size=16, bits=4, desc_act=False, v2=False, sym=False,
    dtype="float16", with_g_idx=True,
):  # fmt: skip
    """``qweight, qzeros, scales, g_idx`` of one layer, and its matrix."""
    length = in_dim if group_size == -1 else group_size
    groups = -(-in_dim // length)
    values, scales = _random(rng, in_dim, out_dim, groups, bits, dtype)
    top = 1 << bits
    # Format v1 cannot tell a zero point of 0 from one of 2 ** bits, so it is never 0 there.
    zeros = rng.integers(0 if v2 else 1, top, (groups, out_dim), dtype=np.uint32)
    zeros = np.full_like(zeros, top // 2) if sym else zeros
    runs = np.arange(in_dim) // length
    group_of = rng.permutation(runs) if desc_act else runs
    stored_zeros = zeros if v2 else zeros - 1
    tensors = {
        "qweight": _words(values, bits),
        "qzeros": np.ascontiguousarray(_words(stored_zeros.T, bits).T),
        "scales": scales,
    }
    if with_g_idx:
        tensors["g_idx"] = group_of.astype(np.int32)
    return tensors, _read(values, zeros, scales, group_of, dtype)


def awq(rng, in_dim, out_dim, *, group_size=16, dtype="float16"):
    """``qweight, qzeros, scales`` of one layer in the "gemm" layout, and its matrix."""
    groups = in_dim // group_size
    values, scales = _random(rng, in_dim, out_dim, groups, 4, dtype)
    zeros = rng.integers(0, 16, (groups, out_dim), dtype=np.uint32)
    tensors = {"qweight": _awq_words(values), "qzeros": _awq_words(zeros), "scales": scales}
    return tensors, _read(values, zeros, scales, np.arange(in_dim) // group_size, dtype)


def _awq_words(values):
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate(AWQ_ORDER):
            words[:, word] |= values[:, 8 * word + column] << np.uint32(4 * nibble)
    return words.view(np.int32)


def compressed(
    rng, in_dim, out_dim, *, group_size=16, bits=4, symmetric=True, ordered=False, dtype="bfloat16"
):
    """``weight_packed, weight_scale, ...`` of one layer, and its matrix."""
    length = in_dim if group_size == -1 else group_size
    groups = in_dim // length
    values, scales = _random(rng, in_dim, out_dim, groups, bits, np.float32)
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    scales = scales.astype(dtype)
    zeros = rng.integers(0, 1 << bits, (groups, out_dim), dtype=np.uint32)
    zeros = np.full_like(zeros, 1 << bits - 1) if symmetric else zeros
    runs = np.arange(in_dim) // length
    group_of = rng.permutation(runs) if ordered else runs
    tensors = {
        "weight_packed": np.ascontiguousarray(_words(values, bits).T),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array([out_dim, in_dim], np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _words(np.ascontiguousarray(zeros.T), bits)
    if ordered:
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    return tensors, _read(values, zeros, scales, group_of, dtype)
