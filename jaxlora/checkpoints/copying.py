"""Copies of large host arrays on all cores: turned round, or to another width, as they go."""

import math
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np

from jaxlora.ops.chunks import host_device

_ALIGNMENT = 64  # bytes
_CORES = os.cpu_count() or 1
_POOL = ThreadPoolExecutor(_CORES)
_LARGE = 1 << 22  # bytes from which numpy does
# Bytes that a thread turns round at once: more than a call costs, less than a cache holds.
_PIECE = 1 << 20


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized buffer that a CPU device can take over as it is."""
    size = math.prod(shape) * dtype.itemsize
    if size >= _LARGE and sys.platform == "linux":
        # Numpy asks for huge pages, for which the kernel may first have to move others: 600 MiB
        # took 0.4 to 1.4 s of a core to touch, and 0.2 s in pages of the usual size.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, dtype).reshape(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Does ``target[...] = source`` on every core.

    Args:
      target: of any dtype.
      source: of the same shape. A matrix whose transpose is contiguous, as `[in, out]` views of
        `[out, in]` tensors are, is turned round by XLA's runtime: numpy takes four times as long.
    """
    if target.ndim < 2:
        target[...] = source
        return
    # Along the axis that the source has outermost: pieces of it are read in one go.
    turned = abs(source.strides[-1]) > abs(source.strides[-2])
    axis = source.ndim - 1 if turned else 0
    rows = max(1, _PIECE * source.shape[axis] // max(source.nbytes, 1))
    starts = range(0, source.shape[axis], rows)

    def piece(start: int) -> None:
        place = (*[slice(None)] * axis, slice(start, start + rows))
        part = source[place]
        _convert(target[place], _turned(part) if turned else part)

    list(_POOL.map(piece, starts))


def _turned(part: np.ndarray) -> np.ndarray:
    """A contiguous copy of a transposed array, where XLA's runtime can make one."""
    cpu, width = host_device(), part.dtype.itemsize
    if cpu is None or width > 4:  # JAX narrows wider words
        return part
    return np.asarray(jax.device_put(part.view(f"u{width}"), cpu)).view(part.dtype)


def _convert(target: np.ndarray, source: np.ndarray) -> None:
    if target.dtype == source.dtype:  # as words: numpy copies bfloat16 one element at a time
        word = f"u{target.dtype.itemsize}"
        target.view(word)[...] = source.view(word)
    elif target.dtype == np.float32 and source.dtype == ml_dtypes.bfloat16:
        # A bfloat16 is the upper half of a float32.
        np.left_shift(source.view(np.uint16), np.uint32(16), out=target.view(np.uint32))
    else:
        target[...] = source
