"""Rotary position embedding (RoFormer, Su et al. 2021) and the scalings that stretch it."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    Attributes:
      kind: ``"linear"`` (divide every frequency by `factor`) or ``"llama3"`` (divide the slow ones,
        keep the fast ones, blend between: Llama 3.1).
      factor: stretch factor, > 0.
      low_freq_factor, high_freq_factor: llama3's blend borders, in turns per original context.
      original_context: context length in tokens that the model was pre-trained with.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, "half"]:
    """Returns the angle in radians that each pair of channels turns per position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    assert scaling.kind == "llama3", scaling.kind
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return scaled.astype(np.float32)


def rope_angles(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, "half"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Returns cosine and sine of each position's angles, in float32."""
    # float32: bfloat16 rounds position 257 to 256, but sin(257) is nowhere near sin(256).
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"],
    angles: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]],
) -> Float[Array, "B T N H"]:
    """Rotates channel pairs ``(i, i + H/2)`` of queries or keys (the Hugging Face pairing)."""
    cos, sin = (angle.astype(x.dtype) for angle in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
