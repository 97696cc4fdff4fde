"""Attention kernels on a mesh: each device is given its own rows and heads."""

import jax
from jax.sharding import PartitionSpec

from jaxlora.core import axes
from jaxlora.ops.attention import Attend
from jaxlora.ops.layout import partition
from jaxlora.parallel.rules import Placement


def on_each_device(attend: Attend, placement: Placement) -> Attend:
    """Returns `attend` for arrays that are split over a mesh, rows by batch and heads by tensor.

    A kernel is one call for the compiler, which cannot split it. Heads stay whole where queries,
    keys and values do not all divide: a share of queries must find its keys beside it.
    """
    mesh = placement.mesh
    if mesh.size == 1:
        return attend

    def wrapped(q, k, v, visible, *, scale=None, softcap=None, sinks=None):
        rows, _, heads, _ = partition(mesh, (axes.BATCH, None, axes.HEADS, None), q.shape)
        _, _, kv_heads, _ = partition(mesh, (axes.BATCH, None, axes.KV_HEADS, None), k.shape)
        heads = heads if kv_heads is not None else None
        of_tokens = PartitionSpec(rows, None, heads, None)
        of_visible = jax.tree.map(
            lambda x: PartitionSpec(rows) if getattr(x, "ndim", 0) else PartitionSpec(), visible
        )

        def share(q, k, v, visible, sinks):
            return attend(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)

        each = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(of_tokens, of_tokens, of_tokens, of_visible, PartitionSpec(heads)),
            out_specs=of_tokens,
            check_vma=False,
        )
        return each(q, k, v, visible, sinks)

    return wrapped
