"""A cheap digest of a base model, so that an adapter can tell the base it was trained on."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxlora.checkpoints.gguf_files import open_weights
from jaxlora.checkpoints.tensors import FLOAT_DTYPES

# Copies and leftovers that come and go when a model is saved again.
_UNSTABLE = ("lm_head.weight", "rotary_emb.inv_freq", "self_attn.masked_bias")
_ELEMENTS = 1024


def base_fingerprint(folder: Path) -> str:
    """Returns a digest of the weights: every tensor's name, shape and first numbers.

    Values count in bfloat16, and how they are split into files does not, so the same model saved
    again in another precision or other shards keeps its fingerprint. Fine-tuning any matrix
    changes it.

    Raises:
      UserError: the weights cannot be read.
    """
    files = open_weights(folder)
    digest = hashlib.sha256()
    for name in sorted(files.info):
        info = files.info[name]
        if name.endswith(_UNSTABLE) or info.dtype not in FLOAT_DTYPES or not info.size:
            continue
        first = files.read(name, slice(0, 1)).reshape(-1)[:_ELEMENTS]
        with np.errstate(over="ignore", invalid="ignore"):
            values = first.astype(np.float32).astype(ml_dtypes.bfloat16)
        digest.update(f"{name} {list(info.shape)} ".encode() + values.tobytes())
    return digest.hexdigest()[:32]
