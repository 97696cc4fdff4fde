"""Adam with moments in 8 bits ("8-bit Optimizers via Block-wise Quantization", Dettmers 2022).

Each block of 256 values along one axis shares a float32 scale, and every value is the nearest of
256 numbers that crowd around zero. The codes have their parameter's shape, so that they are
sharded as it is.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlora.ops.nf4 import DYNAMIC_MAP

BLOCK = 256
# As in bitsandbytes: what is smaller saves nothing worth its rounding, norms and biases above all.
MIN_SIZE = 4096

Moment = Any  # a float32 array, or {"codes": uint8 [*shape], "scales": float32 [*shape / block]}


class BlockwiseAdamState(NamedTuple):
    """Steps taken, and both moments of every leaf."""

    count: Any
    mu: Any
    nu: Any


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """Returns the 256 numbers in [-1, 1], or [0, 1], that codes stand for.

    Seven decades, each with twice the numbers of the one below, evenly spaced within it.

    >>> len(dynamic_map(False)), float(dynamic_map(False)[0]), float(dynamic_map(False)[-1])
    (256, 0.0, 1.0)
    """
    if signed:  # the one of nf4's double quantization
        return DYNAMIC_MAP
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + 1) + 1)
        values += [*(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)]
    return np.sort(np.asarray(values, np.float32))


def block_axis(shape: tuple[int, ...]) -> int:
    """Returns the axis that blocks run along: the longer of the last two.

    A LoRA pair has its rank on the other, which is shorter than a block.

    >>> block_axis((32, 4096, 16)), block_axis((32, 16, 4096)), block_axis((512,))
    (-2, -1, -1)
    """
    return -2 if len(shape) > 1 and shape[-2] > shape[-1] else -1


def quantize(x: Float[Array, "..."], *, signed: bool) -> Moment:
    """Returns the codes and scales of `x`, in blocks along `block_axis`."""
    axis = block_axis(x.shape)
    blocks = _blocks(x, axis)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    unit = blocks / jnp.where(scales == 0, 1.0, scales)[..., None]
    table = dynamic_map(signed)
    middles = (table[:-1] + table[1:]) * np.float32(0.5)
    # Eight unrolled halvings fuse into one pass; comparing with all 255 costs 40 times as much.
    codes = jnp.searchsorted(jnp.asarray(middles), unit, method="scan_unrolled").astype(jnp.uint8)
    return {"codes": _unblock(codes, x.shape, axis), "scales": jnp.moveaxis(scales, -1, axis)}


def dequantize(moment: Moment, *, signed: bool) -> Float[Array, "..."]:
    """Returns the float32 numbers of a moment."""
    if not isinstance(moment, dict):
        return moment
    shape = moment["codes"].shape
    axis = block_axis(shape)
    values = jnp.asarray(dynamic_map(signed))[_blocks(moment["codes"], axis).astype(jnp.int32)]
    scales = jnp.moveaxis(moment["scales"], axis, -1)
    return _unblock(values * scales[..., None], shape, axis)


def _blocks(x, axis: int):
    """``[..., blocks, 256]``, `axis` last and filled up with zeros."""
    x = jnp.moveaxis(x, axis, -1)
    filling = -x.shape[-1] % BLOCK
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, filling)])
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _unblock(blocks, shape: tuple[int, ...], axis: int):
    flat = blocks.reshape(*blocks.shape[:-2], -1)[..., : shape[axis]]
    return jnp.moveaxis(flat, -1, axis)


def scale_by_blockwise_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` whose moments are kept in 8 bits between steps.

    Leaves with fewer than `MIN_SIZE` numbers keep float32 moments.
    """

    def empty(leaf):
        zeros = jnp.zeros(leaf.shape, jnp.float32)
        return zeros if leaf.size < MIN_SIZE else quantize(zeros, signed=True)

    def init(params):
        moments = jax.tree.map(empty, params)
        return BlockwiseAdamState(jnp.zeros((), jnp.int32), moments, moments)

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        correction1, correction2 = 1 - b1**count, jnp.sqrt(1 - b2**count)

        def of_leaf(gradient, mu, nu):
            new_mu = b1 * dequantize(mu, signed=True) + (1 - b1) * gradient
            new_nu = b2 * dequantize(nu, signed=False) + (1 - b2) * gradient**2
            step = new_mu / correction1 / (jnp.sqrt(new_nu) / correction2 + eps)
            if isinstance(mu, dict):
                new_mu, new_nu = quantize(new_mu, signed=True), quantize(new_nu, signed=False)
            return step, new_mu, new_nu

        leaves, structure = jax.tree.flatten(updates)
        moments = (structure.flatten_up_to(each) for each in (state.mu, state.nu))
        done = [of_leaf(*each) for each in zip(leaves, *moments, strict=True)]
        steps, mu, nu = (structure.unflatten([each[i] for each in done]) for i in range(3))
        return steps, BlockwiseAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
