"""Attention on a mesh: each device computes its own rows and heads.

Over `context`, which splits the tokens of a row, heads are traded for tokens and back: all-to-all
attention (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509). A device then has some of the
heads of whole rows, and attends with what it would use alone.
"""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from jaxlora.core import axes
from jaxlora.ops.attention import Attend
from jaxlora.ops.layout import RULES, partition, ways
from jaxlora.parallel.head_shares import HeadShares, shares_over_context
from jaxlora.parallel.rules import Placement

(_CONTEXT,) = RULES[axes.SEQUENCE]
_TOKENS, _HEADS = 1, 2  # of queries, keys, values and results


def on_each_device(attend: Attend, placement: Placement) -> Attend:
    """Returns `attend` for arrays that are split over a mesh: rows, tokens and heads.

    A kernel is one call for the compiler, which cannot split it. Over `tensor` a device has its
    query heads, and of the key-value heads those that they read; all of them where they do not
    divide. Over `context` heads are exchanged. Where they are too few for that
    (`shares_over_context`) every device has its own queries and gathers the keys and values of the
    whole row, which no kernel can serve; their gradients are summed on the way back.
    """
    mesh = placement.mesh
    if mesh.size == 1:
        return attend

    def wrapped(q, k, v, visible, *, scale=None, softcap=None, sinks=None):
        num_heads, num_kv_heads = q.shape[_HEADS], k.shape[_HEADS]
        split = (axes.BATCH, axes.SEQUENCE, axes.HEADS, None)
        rows, tokens, heads, _ = partition(mesh, split, q.shape)
        if heads is not None:
            over_tensor = HeadShares(num_heads, num_kv_heads, ways(mesh, axes.HEADS))
            k, v = (over_tensor.of_keys(x, axis=_HEADS) for x in (k, v))
        shares = shares_over_context(mesh, num_heads, num_kv_heads) if tokens else None
        gathers = tokens is not None and shares is None
        of_queries = PartitionSpec(rows, tokens, heads, None)
        of_keys = PartitionSpec(rows, None if gathers else tokens, heads, None)
        if gathers:  # places are not positions any more
            visible = dataclasses.replace(visible, in_place=False)
        of_positions = PartitionSpec(rows, tokens if gathers else None)
        of_visible = dataclasses.replace(
            visible,
            query_positions=of_positions,
            query_segments=of_positions,
            key_positions=PartitionSpec(rows),
            key_segments=PartitionSpec(rows),
            kind=PartitionSpec(),
        )
        each = attend if shares is None else exchanging_heads(attend, shares)

        def share(q, k, v, visible, sinks):
            return each(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)

        return jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(of_queries, of_keys, of_keys, of_visible, PartitionSpec(heads)),
            out_specs=of_queries,
            check_vma=False,
        )(q, k, v, visible, sinks)

    return wrapped


def exchanging_heads(attend: Attend, shares: HeadShares) -> Attend:
    """Returns `attend` for devices that have all heads of some tokens, within a `shard_map`.

    `visible` is of the whole row.
    """

    def exchanged(q, k, v, visible, *, scale=None, softcap=None, sinks=None):
        q, k, v = (
            jax.lax.all_to_all(x, _CONTEXT, split_axis=_HEADS, concat_axis=_TOKENS, tiled=True)
            for x in (
                shares.of_queries(q, axis=_HEADS),
                *(shares.of_keys(x, axis=_HEADS) for x in (k, v)),
            )
        )
        if sinks is not None:
            first = jax.lax.axis_index(_CONTEXT) * shares.heads
            sinks = shares.of_queries(sinks, axis=0)
            sinks = jax.lax.dynamic_slice_in_dim(sinks, first, shares.heads)
        y = attend(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)
        y = jax.lax.all_to_all(y, _CONTEXT, split_axis=_TOKENS, concat_axis=_HEADS, tiled=True)
        return y[:, :, : shares.num_heads]

    return exchanged
