"""Attention on a mesh: each device is given its own rows, queries and heads."""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from jaxlora.core import axes
from jaxlora.ops.attention import Attend
from jaxlora.ops.layout import partition
from jaxlora.parallel.rules import Placement


def on_each_device(attend: Attend, placement: Placement) -> Attend:
    """Returns `attend` for arrays that are split over a mesh: rows, queries and heads.

    A kernel is one call for the compiler, which cannot split it. Heads stay whole where queries,
    keys and values do not all divide: a share of queries must find its keys beside it. Over
    `context` every device has its own queries and gathers the keys and values of the whole row;
    their gradients are summed on the way back.
    """
    mesh = placement.mesh
    if mesh.size == 1:
        return attend

    def wrapped(q, k, v, visible, *, scale=None, softcap=None, sinks=None):
        split = (axes.BATCH, axes.SEQUENCE, axes.HEADS, None)
        rows, tokens, heads, _ = partition(mesh, split, q.shape)
        _, _, kv_heads, _ = partition(mesh, (axes.BATCH, None, axes.KV_HEADS, None), k.shape)
        heads = heads if kv_heads is not None else None
        of_queries = PartitionSpec(rows, tokens, heads, None)
        of_keys = PartitionSpec(rows, None, heads, None)
        if tokens is not None:  # places are not positions any more
            visible = dataclasses.replace(visible, in_place=False)
        of_visible = dataclasses.replace(
            visible,
            query_positions=PartitionSpec(rows, tokens),
            query_segments=PartitionSpec(rows, tokens),
            key_positions=PartitionSpec(rows),
            key_segments=PartitionSpec(rows),
            kind=PartitionSpec(),
        )

        def share(q, k, v, visible, sinks):
            return attend(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)

        each = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(of_queries, of_keys, of_keys, of_visible, PartitionSpec(heads)),
            out_specs=of_queries,
            check_vma=False,
        )
        return each(q, k, v, visible, sinks)

    return wrapped
