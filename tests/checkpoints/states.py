"""States that a test and the processes it starts both make from a step number."""

import ml_dtypes
import numpy as np


def state_of(step, size=4096):
    """A pytree of every dtype a run saves; its bytes are a function of `step` alone."""
    bits = np.random.default_rng(step).integers(0, 256, size, dtype=np.uint8)
    return {
        "adapter": {
            "layers/attention/q_proj/kernel": {"a": bits.view(np.int32).astype(np.float32)}
        },
        "optimizer": (
            {"count": np.asarray(step, np.int32), "mu": bits.astype(ml_dtypes.bfloat16)},
            (),
            [bits.view(np.int8), (bits % 16).astype(np.int8).astype(ml_dtypes.int4)],
        ),
        "key": bits[:8].view(np.uint32),
    }


def same_bits(left, right):
    """Whether two flat ``{path: array}`` dicts agree in names, dtypes, shapes and every bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes()
        for name in left
    )
