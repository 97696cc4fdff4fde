"""Rotary position embedding (RoFormer, Su et al. 2021) and the scalings that stretch it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Angles = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    Attributes:
      kind: ``linear`` (every frequency divided by `factor`), ``llama3`` (slow ones divided, fast
        ones kept, blended between: Llama 3.1), ``yarn`` (the same idea over channels: Peng et al.
        2023), ``dynamic`` (theta grows with the sequence) or ``longrope`` (a divisor for every
        channel, another set beyond the original context: Ding et al. 2024).
      factor: stretch factor, > 0.
      low_freq_factor, high_freq_factor: llama3's blend borders, in turns per original context.
      original_context: context length in tokens that the model was pre-trained with.
      beta_fast, beta_slow: yarn's blend borders, in turns per original context.
      truncate: whether yarn rounds its borders to whole channels.
      attention_factor: multiplies cosine and sine (yarn and longrope).
      short_factor, long_factor: longrope's divisors.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, "half"]:
    """Returns the angle in radians that each pair of channels turns per position.

    For ``dynamic`` and ``longrope`` these hold up to the original context; `rope_angles` switches.
    """
    frequencies = np.float32(1) / _periods(head_dim // 2, theta)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    scaled = _SCALED[scaling.kind](frequencies, scaling, theta)
    return np.asarray(scaled, np.float32)


def _linear(frequencies: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    return frequencies / np.float32(scaling.factor)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    dim = 2 * len(frequencies)

    def channel(turns: float) -> float:  # the channel pair that makes so many turns
        return (
            dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    stretch = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return frequencies / scaling.factor * stretch + frequencies * (1 - stretch)


def _longrope(frequencies: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    return _divided(len(frequencies), theta, scaling.short_factor)


def _divided(pairs: int, theta: float, divisors: tuple[float, ...]) -> np.ndarray:
    return 1.0 / (np.asarray(divisors, np.float32) * _periods(pairs, theta))


def _periods(pairs: int, theta: float) -> np.ndarray:
    # Rounded once, as torch's powers are: NumPy's in float32 are one off in a seventh of the
    # channels, which a position of 100,000 turns into a hundredth of a radian.
    exponents = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(2 * pairs)
    return (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def rope_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Angles:
    """Returns cosine and sine of each position's angles, in float32."""
    frequencies = rope_frequencies(head_dim, theta, scaling)
    if scaling is not None and scaling.kind in ("dynamic", "longrope"):
        frequencies = _late_frequencies(positions, frequencies, theta, scaling)
    # float32: bfloat16 rounds position 257 to 256, but sin(257) is nowhere near sin(256).
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    gain = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angles) * gain, jnp.sin(angles) * gain


def _late_frequencies(
    positions: Int[Array, "B T"], early: np.ndarray, theta: float, scaling: RopeScaling
) -> Float[Array, "half"]:
    """The frequencies of a batch whose longest sequence may pass the original context."""
    length = jnp.max(positions) + 1
    if scaling.kind == "longrope":
        late = _divided(len(early), theta, scaling.long_factor)
        return jnp.where(length > scaling.original_context, late, early)
    dim = 2 * len(early)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    times = jnp.maximum(length, scaling.original_context) / scaling.original_context
    stretched = theta * (scaling.factor * times - (scaling.factor - 1)) ** (dim / (dim - 2))
    return 1.0 / stretched**exponents


def rotate(
    x: Float[Array, "B T N H"], angles: Angles, *, interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Rotates channel pairs of queries or keys.

    Pairs are ``(i, i + R/2)`` (Hugging Face's LLaMA) or, interleaved, ``(2i, 2i + 1)``, within the
    first R channels, R being twice the number of angles; the other channels pass.
    """
    return _rotate(x, *angles, interleaved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(x, cos, sin, interleaved):
    return _turn(x, cos.astype(x.dtype), sin.astype(x.dtype), interleaved)


def _rotate_forward(x, cos, sin, interleaved):
    return _rotate(x, cos, sin, interleaved), (cos, sin)


def _rotate_backward(interleaved, angles, dy):
    # Turned back in float32 and rounded once. Angles are those of positions: nothing trains them.
    cos, sin = angles
    wide = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
    return _turn(wide, cos, -sin, interleaved).astype(dy.dtype), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _turn(x, cos, sin, interleaved):
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
        return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
    return jnp.concatenate([*pair, rest] if rest.shape[-1] else pair, axis=-1)
