"""Writes a safetensors file one tensor at a time, so that a shard never lies in memory whole."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

_WORDS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: np.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Writes the tensors `shapes` names, all of one dtype, asking `tensor` for each in turn.

    Args:
      path: file to write; forced to disk before the call returns.
      shapes: ``{tensor name: shape}``.
      tensor: gives the values, of that shape and `dtype`.
      dtype: float32, float16 or bfloat16.
      metadata: free text; ``{"format": "pt"}`` is what transformers looks for.
    """
    dtype = np.dtype(dtype)
    entries, start = {}, 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape)) * dtype.itemsize
        entries[name] = {
            "dtype": _WORDS[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    header = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            values = np.asarray(tensor(name), order="C")
            assert values.shape == tuple(shape), (name, values.shape, shape)
            assert values.dtype == dtype, (name, values.dtype, dtype)
            file.write(values.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
