"""A plan by formula: exact where shapes decide, a model of what the compiler does elsewhere.

For devices whose compiler is not installed, and to compare changes without compiling each. What
`docs/planning.md` says of its error is measured by `benchmarks/plan_accuracy.py`.
"""

from typing import Any

import jax

from jaxlora.ops.arrays import QuantizedArray
from jaxlora.ops.loss import tokens_per_chunk
from jaxlora.parallel.head import SplitHead
from jaxlora.parallel.head_shares import shares_over_context
from jaxlora.planning.compiled import describe
from jaxlora.planning.estimate import Estimate, Memory, Traffic, bytes_per_device
from jaxlora.planning.hardware import Hardware
from jaxlora.planning.program import Program

# How many float32 copies of a chunk of logits (`ops.loss`) live at once.
_LOGIT_COPIES = 2
# Copies of the widest activations of a layer that live while it is gone back through.
_LAYER_COPIES = 3


def estimate(program: Program, *, topology: str, hardware: Hardware) -> Estimate:
    """Returns what the formulas say of a program; see `compiled.estimate` for the arguments."""
    trained = bytes_per_device(program.trainable)
    memory = Memory(
        weights=bytes_per_device(program.frozen),
        trained=trained + bytes_per_device(program.initial),
        optimizer=bytes_per_device(program.opt_state),
        batch=bytes_per_device(program.batch),
        activations=int(_activations(program)),
        gradients=trained,
        workspace=int(_workspace(program)),
    )
    return describe(
        program,
        topology=topology,
        hardware=hardware,
        method="formula",
        memory=memory,
        traffic=_traffic(program),
        compile_s=0.0,
        host_bytes=int(_offloaded(program)),
    )


def _sizes(program: Program) -> tuple[int, int, int, int]:
    """Tokens of a micro-batch on one device, bytes of a number, ways layers and rows are split."""
    tokens, mesh = program.batch["tokens"], program.shape.placement.mesh.shape
    _, rows, length = tokens.sharding.shard_shape(tokens.shape)
    number = program.shape.transformer.dtype.itemsize
    return rows * length, number, mesh["tensor"], rows


def _widths(program: Program) -> tuple[int, int, float]:
    """Channels of attention (queries, keys, values, output) and of one MLP product, a device's."""
    cfg = program.shape.cfg
    _, _, split, _ = _sizes(program)
    heads = cfg.num_heads * (cfg.head_dim + cfg.value_dim)
    keys = cfg.num_kv_heads * (cfg.head_dim + cfg.value_dim)
    wide = float(cfg.mlp_dim)
    if cfg.moe is not None:
        wide = max(wide, cfg.moe.routing.top_k * cfg.moe.mlp_dim + cfg.moe.shared_dim)
    return cfg.embed_dim, (heads + keys) // split, wide / split


def _activations(program: Program) -> float:
    """What each policy of `REMAT_POLICIES` saves of every layer."""
    tokens, number, _, _ = _sizes(program)
    stream, attention, wide = _widths(program)
    if program.shape.transformer.remat == "offload":  # one layer's on its way out, one coming in
        return 2 * tokens * number * stream
    saved = {
        "full": stream,
        "attention": 2 * stream + attention,
        "matmuls": 2 * stream + attention + 2 * wide,
        "none": 4 * stream + 2 * attention + 4 * wide,
    }[program.shape.transformer.remat]
    return program.shape.cfg.num_layers * tokens * number * saved


def _offloaded(program: Program) -> float:
    """What waits in the host's memory."""
    if program.shape.transformer.remat != "offload":
        return 0.0
    tokens, number, _, _ = _sizes(program)
    return program.shape.cfg.num_layers * tokens * number * program.shape.cfg.embed_dim


def _workspace(program: Program) -> float:
    """The larger of two moments: the loss, or going back through one layer."""
    cfg = program.shape.cfg
    tokens, number, split, rows = _sizes(program)
    stream, attention, wide = _widths(program)
    # Of a GPU or TPU; a CPU's are smaller, and counted for more than they are.
    chunk = min(max(tokens_per_chunk(cfg.vocab_size, "gpu"), rows), tokens)
    loss = _LOGIT_COPIES * 4.0 * chunk * cfg.vocab_size / split + 3 * tokens * stream * number
    layer = _LAYER_COPIES * tokens * number * (stream + attention + wide)
    return max(loss, layer + _unpacked(program)) + _head(program, chunk)


def _unpacked(program: Program) -> float:
    """The two largest matrices of a layer as the device multiplies by them, gathered."""
    _, number, split, _ = _sizes(program)
    sizes = sorted(
        spec.size / len(spec.layers or (0,)) / split
        for spec in program.shape.specs.values()
        if spec.kind in ("linear", "experts")
    )
    return number * sum(sizes[-2:])


def _head(program: Program, chunk: int) -> float:
    """What a head whose numbers are split over `fsdp` takes beside them while it is used."""
    mesh, cfg = program.shape.placement.mesh, program.shape.cfg
    fsdp, number = mesh.shape["fsdp"], program.shape.transformer.dtype.itemsize
    head = cfg.vocab_size * cfg.embed_dim * number / mesh.shape["tensor"]
    if fsdp == 1:
        return 0.0
    if not SplitHead(mesh, cfg).splits:  # the compiler gathers it
        return head
    # Its numbers change places; a chunk's hidden states of all rows, and their gradient.
    return head / fsdp + 2 * fsdp * chunk * cfg.embed_dim * number


def _traffic(program: Program) -> tuple[Traffic, ...]:
    """Gathers of sharded weights for each pass, heads over `context`, and sums of gradients."""
    mesh = program.shape.placement.mesh
    fsdp, replicas = mesh.shape["fsdp"], mesh.size // mesh.shape["tensor"]
    passes = 2 + (program.shape.transformer.remat != "none")
    passes *= program.batch["tokens"].shape[0]
    found = _over_context(program, passes) if mesh.shape["context"] > 1 else []
    if fsdp > 1:
        by_dtype: dict[str, float] = {}
        for leaf in _whole_leaves(program.frozen):
            values = leaf.values if isinstance(leaf, QuantizedArray) else leaf
            name = {"int4": "s4", "uint4": "u4", "int8": "s8", "uint8": "u8"}.get(
                str(values.dtype), "bf16"
            )
            by_dtype[name] = by_dtype.get(name, 0.0) + bytes_per_device(values) * fsdp
        found += [
            Traffic("all-gather", name, passes, size * passes, size * passes * (fsdp - 1) / fsdp)
            for name, size in by_dtype.items()
        ]
    if replicas > 1:
        gradients = float(bytes_per_device(program.trainable)) * fsdp
        sent = 2 * gradients * (replicas - 1) / replicas
        found.append(Traffic("all-reduce", "f32", 1, gradients, sent))
    return tuple(found)


def _over_context(program: Program, passes: int) -> list[Traffic]:
    """Queries, keys, values and results exchanged, or keys and values gathered, in every pass."""
    cfg, mesh = program.shape.cfg, program.shape.placement.mesh
    tokens, number, _, _ = _sizes(program)
    parts, passes = mesh.shape["context"], passes * cfg.num_layers
    shares = shares_over_context(mesh, cfg.num_heads, cfg.num_kv_heads)
    # Of each head a key (or query) and a value (or result) go to one device for a whole row.
    head = float(number * parts * tokens * (cfg.head_dim + cfg.value_dim))
    if shares is None:
        kind, heads, times = "all-gather", cfg.num_kv_heads, 2 * passes
    else:
        kind, heads, times = "all-to-all", shares.heads + shares.kv_heads, 4 * passes
    payload = passes * heads * head
    name = {2: "bf16", 4: "f32"}[number]
    return [Traffic(kind, name, times, payload, payload * (parts - 1) / parts)]


def _whole_leaves(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return [leaf for leaf in leaves if len(leaf.shape) > 1]
