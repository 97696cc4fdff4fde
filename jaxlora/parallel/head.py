"""Logits on a mesh: each device has its part of the vocabulary, for the rows of all of them."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.core import axes
from jaxlora.core.tree import Tree
from jaxlora.models.config import ModelConfig
from jaxlora.ops.layout import RULES

_FREE = PartitionSpec.UNCONSTRAINED


@dataclasses.dataclass(frozen=True)
class SplitHead:
    """How devices that have rows of their own share a head whose numbers are split over `fsdp`.

    Gathered, it would be whole on every device for each chunk of the loss (Llama 3 70B: 2 GiB).
    Here the hidden states of a chunk are gathered instead, which are a fraction of it, every device
    computes their logits in its part of the vocabulary, and what crosses the network of those are
    sums over it.

    Attributes:
      mesh: of the devices, None for one.
      cfg: of the model. Left to the compiler are a vocabulary that does not divide, a table that is
        looked up too, and a head with more than a product in it.
    """

    mesh: Any
    cfg: ModelConfig

    @property
    def splits(self) -> bool:
        """Whether there is anything to share."""
        cfg = self.cfg
        if self.mesh is None or self.mesh.shape.get("fsdp", 1) == 1:
            return False
        if cfg.tie_embedding or cfg.num_labels or cfg.head_activation is not None:
            return False
        return cfg.vocab_size % (self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]) == 0

    def weights(self, params: Tree) -> Tree:
        """Returns a parameter tree whose head is split along the vocabulary alone."""
        if not self.splits:
            return params

        def split(x: jax.Array) -> jax.Array:
            if x.ndim == 0 or x.shape[-1] != self.cfg.vocab_size:
                return x
            return self._constrain(x, *(None,) * (x.ndim - 1), ("tensor", "fsdp"))

        return {**params, "lm_head": jax.tree.map(split, params["lm_head"])}

    def rows(self, hidden: jax.Array) -> jax.Array:
        """Returns hidden states ``[B, ..., D]`` of all rows on every device of `fsdp`."""
        return _gathered(hidden, self) if self.splits else hidden

    def logits(self, y: jax.Array) -> jax.Array:
        """Returns logits ``[B, ..., V]``, each device's of its part of the vocabulary."""
        if not self.splits:
            return y
        return self._constrain(y, self._rows(), *(_FREE,) * (y.ndim - 2), ("tensor", "fsdp"))

    def _rows(self) -> tuple[str, ...]:
        return tuple(axis for axis in RULES[axes.BATCH] if axis != "fsdp")

    def _constrain(self, x: jax.Array, *split: Any) -> jax.Array:
        sharding = NamedSharding(self.mesh, PartitionSpec(*split))
        return jax.lax.with_sharding_constraint(x, sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(hidden: jax.Array, head: SplitHead) -> jax.Array:
    free = (_FREE,) * (hidden.ndim - 2)
    return head._constrain(hidden, head._rows(), *free, None)


def _gathered_forward(hidden: jax.Array, head: SplitHead) -> tuple[jax.Array, None]:
    return _gathered(hidden, head), None


def _gathered_backward(head: SplitHead, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Each device's rows of the sum over the vocabulary: pinned as the rows are gathered, every
    # device would have all of them.
    free = (_FREE,) * (gradient.ndim - 2)
    return (head._constrain(gradient, RULES[axes.BATCH], *free, None),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
