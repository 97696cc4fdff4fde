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
    """Heads shared out over devices, neighbours to one, with the key-value heads that they read.

    Attributes:
      num_heads, num_kv_heads: what is shared out.
      parts: how many devices.

    >>> shares = HeadShares(32, 8, 16)  # two query heads for each, and a copy of the one they read
    >>> shares.heads, shares.kv_heads, shares.copies
    (2, 1, 2)
    >>> HeadShares(14, 2, 4).filled
    16
    """

    num_heads: int
    num_kv_heads: int
    parts: int

    @property
    def heads(self) -> int:
        """Query heads of a device; the last devices' may be zeros that fill their shares up."""
        return -(-self.num_heads // self.parts)

    @property
    def filled(self) -> int:
        """Query heads of all devices, zeros among them."""
        return self.parts * self.heads

    @property
    def copies(self) -> int:
        """How often a key-value head is there, as queries of several devices read it."""
        group = self.num_heads // self.num_kv_heads
        return group // math.gcd(group, self.heads)

    @property
    def kv_heads(self) -> int:
        """Key-value heads of a device."""
        return self.heads * self.num_kv_heads * self.copies // self.num_heads

    def of_queries(self, x: jax.Array, *, axis: int) -> jax.Array:
        """Returns `x` with `filled` heads along an axis."""
        return _filled(x, axis, self.filled)

    def of_keys(self, x: jax.Array, *, axis: int) -> jax.Array:
        """Returns keys or values with their copies, and zeros for the zeros of the queries."""
        if self.copies > 1:
            x = jnp.repeat(x, self.copies, axis=axis)
        return _filled(x, axis, self.parts * self.kv_heads)


def shares_over_context(mesh: Any, num_heads: int, num_kv_heads: int) -> HeadShares | None:
    """Returns how the heads of a device are shared out over `context`.

    None where it has less than half as many as there are devices: filled up, there would be more
    zeros than heads, and computing all scores, also those a causal query cannot see, costs less.
    """
    split = ways(mesh, axes.HEADS)
    if num_heads % split == 0:
        over_tensor = HeadShares(num_heads, num_kv_heads, split)
        num_heads, num_kv_heads = over_tensor.heads, over_tensor.kv_heads
    shares = HeadShares(num_heads, num_kv_heads, ways(mesh, axes.SEQUENCE))
    return shares if shares.parts <= 2 * num_heads else None


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
