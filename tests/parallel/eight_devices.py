"""A program with eight CPU devices: trains over meshes and prints the losses as JSON.

    python eight_devices.py METHOD:MESH [METHOD:MESH ...]

METHOD is lora, int4, nf4, int8, gptq or full; MESH is like ``data=2,fsdp=4``, or nothing for
one device.
"""

import dataclasses
import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import lora
from jaxlora.core.tree import flatten, unflatten
from jaxlora.lora import LoraConfig, match
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe, init_params
from jaxlora.models.transformer import Transformer
from jaxlora.ops.attention import reference_attention
from jaxlora.ops.quantize import pack, quantize
from jaxlora.optim.optimizers import make_optimizer
from jaxlora.parallel.attention import on_each_device
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.training.state import init_optimizer
from jaxlora.training.step import make_train_step

CFG = ModelConfig(
    vocab_size=96,
    embed_dim=128,
    mlp_dim=256,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_context=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    init_std=0.08,
)
SPECS = describe(CFG)
LINEAR = [path for path, spec in SPECS.items() if spec.kind == "linear"]
STEPS, ROWS, LENGTH = 4, 8, 12


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, CFG.vocab_size, (2, ROWS, LENGTH)).astype(np.int32)
        yield {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, -1),
            "weights": (rng.random(tokens.shape) > 0.3).astype(np.float32),
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
            "segment_ids": np.ones_like(tokens),
        }


def stored(weights, method):
    """Base weights on the host, the linear ones quantized layer by layer."""
    leaves = {path: np.asarray(weights[path]) for path in SPECS}
    for path in LINEAR if method in ("int4", "nf4", "int8", "gptq") else ():
        layers = [quantized(layer, method) for layer in leaves[path]]
        leaves[path] = jax.tree.map(lambda *parts: np.stack(list(map(np.asarray, parts))), *layers)
    return leaves


def quantized(weight, method):
    if method != "gptq":
        return quantize(weight, method)
    # As GPTQ files are read: packed, with zero points, each group's inputs anywhere.
    rng = np.random.default_rng(0)
    leaf = pack(quantize(weight, "int4", group_size=32))
    zeros = rng.integers(-1, 2, leaf.scales.shape).astype(np.int8)
    groups = rng.permutation(len(weight)).astype(np.int32) // 32
    return dataclasses.replace(leaf, zeros=zeros, groups=groups)


def setup(method, placement):
    """Returns the step and its first arguments."""
    weights = init_params(CFG, jax.random.key(0), jnp.float32)
    base = {
        path: placement.weight(leaf, SPECS[path].axes, stacked=SPECS[path].layers is not None)
        for path, leaf in stored(flatten(weights), method).items()
    }
    if method == "full":
        trainable, frozen, targets = {"params": base, "adapter": {}}, {}, {}
    else:
        modules = {path: SPECS[path].modules() for path in LINEAR}
        targets = match(modules, LoraConfig(r=4, alpha=8, dropout=0.1), LINEAR)
        pairs = lora.init(unflatten(flatten(weights)), targets, jax.random.key(1))
        adapter = {
            path: placement.adapter(pair, SPECS[path].axes, stacked=True)
            for path, pair in pairs.items()
        }
        trainable, frozen = {"params": {}, "adapter": adapter}, base
    every = jax.tree.map(lambda leaf: True, trainable)
    optimizer = make_optimizer("adamw", lambda step: 1e-2, decayed=every, matrices=every)
    opt_state = init_optimizer(optimizer, trainable, placement)
    # Both ways to split attention: by the compiler, and by hand as a kernel needs it.
    attend = on_each_device(reference_attention, placement) if method in ("int4", "full") else None
    transformer = Transformer(
        CFG,
        remat="full",
        constrain=placement.constrain,
        attend=attend or reference_attention,
    )
    like = (trainable, opt_state)
    step = make_train_step(transformer, targets, optimizer, jax.random.key(5), like)
    return step, trainable, opt_state, frozen


def gathers(program):
    """``[dtype, shape]`` of every all-gather of a compiled program."""
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather(?:-start)?\(", program)
    return sorted({(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found})


def train(method, sizes):
    devices = jax.devices() if sizes else jax.devices()[:1]
    placement = Placement(make_mesh(sizes or None, devices))
    step, trainable, opt_state, frozen = setup(method, placement)
    losses, program = [], None
    for number, batch in enumerate(batches()):
        arguments = (trainable, opt_state, frozen, placement.batch(batch), jnp.int32(number))
        program = program or step.lower(*arguments).compile()
        trainable, opt_state, metrics = step(*arguments)
        losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves((trainable, frozen))
    largest = max(leaves, key=lambda leaf: leaf.size)
    return {
        "losses": losses,
        "gathers": gathers(program.as_text()),
        "compiled": step._cache_size(),
        "largest_share": largest.addressable_shards[0].data.size / largest.size,
        "matrices": sorted({SPECS[path].shape for path in LINEAR}),
    }


if __name__ == "__main__":
    results = {}
    for case in sys.argv[1:]:
        method, _, mesh = case.partition(":")
        pairs = [part.split("=") for part in mesh.split(",") if part]
        results[case] = train(method, {axis: int(size) for axis, size in pairs})
    print(json.dumps(results))
