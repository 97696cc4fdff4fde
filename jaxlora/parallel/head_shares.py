"""Which heads of attention a device of a mesh computes, over `tensor` and over `context`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.core import axes
from jaxlora.ops.layout import ways


@dataclasses.dataclass(frozen=True)
class HeadShares:
    """Heads shared out over devices, to each the key-value heads that its queries read.

    Attributes:
      num_heads: query heads that are shared out.
      parts: how many devices.
      heads: query heads of each; the last devices' may be zeros that fill their shares up.
      copies: how often a key-value head is there, as queries of several devices read it.
    """

    num_heads: int
    parts: int
    heads: int
    copies: int

    @property
    def filled(self) -> int:
        """Query heads of all devices, zeros among them."""
        return self.parts * self.heads

    def of_queries(self, x: jax.Array, *, axis: int) -> jax.Array:
        """Returns `x` with `filled` heads along an axis."""
        return _filled(x, axis, self.filled)

    def of_keys(self, x: jax.Array, *, axis: int) -> jax.Array:
        """Returns keys or values with their copies, and zeros for the zeros of the queries."""
        if self.copies > 1:
            x = jnp.repeat(x, self.copies, axis=axis)
        return _filled(x, axis, self.filled * x.shape[axis] // self.num_heads)


def share_out(num_heads: int, num_kv_heads: int, parts: int) -> HeadShares:
    """Returns how heads are shared out over `parts` devices, neighbours to one device.

    >>> share_out(32, 8, 16)  # two query heads for each, and a copy of the one that they read
    HeadShares(num_heads=32, parts=16, heads=2, copies=2)
    >>> share_out(14, 2, 4).filled
    16
    """
    heads, group = -(-num_heads // parts), num_heads // num_kv_heads
    return HeadShares(num_heads, parts, heads, copies=group // math.gcd(group, heads))


def shares_over_context(mesh: Any, num_heads: int, num_kv_heads: int) -> HeadShares | None:
    """Returns how the heads of a device are shared out over `context`.

    None where it has less than half as many as there are devices: filled up, there would be more
    zeros than heads, and computing all scores, also those a causal query cannot see, costs less.
    """
    split = ways(mesh, axes.HEADS)
    if num_heads % split == 0:
        num_kv_heads *= share_out(num_heads, num_kv_heads, split).copies
        num_heads, num_kv_heads = num_heads // split, num_kv_heads // split
    parts = ways(mesh, axes.SEQUENCE)
    return share_out(num_heads, num_kv_heads, parts) if parts <= 2 * num_heads else None


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
