"""Mixtures of experts on a mesh: each device has its own tokens, and over `expert` its own experts.

Tokens of the devices along `expert` are gathered, every device computes what its experts make of
all of them, and the sums go back to where the tokens came from. No token is dropped and nothing
depends on how evenly the router chose; an exchange of single tokens (all-to-all) would send no less
once a token has as many experts as there are devices.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.core import axes
from jaxlora.models.moe import Spread, in_place
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.ops.layout import RULES, left_out, partition, ways
from jaxlora.parallel.rules import Placement

_EXPERT = "expert"
# Axes along which every device has tokens of its own; `tensor` stays with the compiler.
_OWN_TOKENS = (*RULES[axes.BATCH], *RULES[axes.SEQUENCE])


def on_each_device(placement: Placement) -> Spread:
    """Returns how tokens and experts that are split over a mesh are brought together."""
    mesh = placement.mesh
    if all(mesh.shape[axis] == 1 for axis in _OWN_TOKENS):
        return in_place  # every device has all tokens; the compiler splits the matrices

    def spread(choose, compute, leaves, x, logits, correction):
        num_experts, parts = leaves[0][0].shape[0], ways(mesh, axes.EXPERT)
        split = parts > 1 and num_experts % parts == 0
        rows, tokens, _ = partition(mesh, (axes.BATCH, axes.SEQUENCE, None), x.shape)
        of_tokens = PartitionSpec(rows, tokens, None)
        of_leaves = jax.tree.map(lambda leaf: PartitionSpec(_EXPERT if split else None), leaves)

        def share(leaves, x, logits, correction):
            leaves = jax.tree.map(_of_a_share, leaves, is_leaf=_is_quantized)
            weights, experts = choose(logits, correction)
            if not split:
                return compute(leaves, x, weights, experts)
            gather = rows is not None
            if gather:
                x, weights, experts = (
                    jax.lax.all_gather(y, _EXPERT, axis=0, tiled=True)
                    for y in (x, weights, experts)
                )
            first = jax.lax.axis_index(_EXPERT) * (num_experts // parts)
            y = compute(leaves, x, weights, experts, first)
            if gather:
                return jax.lax.psum_scatter(y, _EXPERT, scatter_dimension=0, tiled=True)
            return jax.lax.psum(y, _EXPERT)

        every = mesh.shape["tensor"] == 1
        return jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(of_leaves, of_tokens, of_tokens, PartitionSpec()),
            out_specs=of_tokens,
            axis_names=set(mesh.axis_names) if every else set(_OWN_TOKENS),
            check_vma=False,
        )(leaves, x, logits, correction)

    return spread


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


def _of_a_share(leaf: Any) -> Any:
    """A leaf inside of `shard_map`: of the shardings it asks for, what is left to the compiler.

    Its packed parts come gathered over the other axes. Over `tensor` the compiler would gather
    unpacked numbers, see `Placement.weight`.
    """
    if not isinstance(leaf, QuantizedArray) or leaf.gathered is None:
        return leaf
    mesh = jax.sharding.get_abstract_mesh()
    if len(mesh.manual_axes) == len(mesh.axis_names):
        return dataclasses.replace(leaf, gathered=None)
    gathered = tuple(
        each and NamedSharding(mesh, left_out(each.spec, mesh.manual_axes))
        for each in leaf.gathered
    )
    return dataclasses.replace(leaf, gathered=gathered)
