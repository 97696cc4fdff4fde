"""A program with eight CPU devices: trains over meshes and prints a line of JSON for each.

    python eight_devices.py STEPS ACCUMULATION METHOD:MESH [METHOD:MESH ...]

METHOD is lora, int4, nf4, int8, gptq or full, ``moe-`` before it for a mixture of experts, or
``kernel-`` before int4 or nf4 for the TPU's kernel, interpreted. MESH is like ``data=2,fsdp=4``, or
nothing for one device, which every other of its method comes after.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

# Every layout is a program of its own, and compiling it costs more than its 20 steps: LLVM is told
# not to optimize. What is tested, the partitioned program, comes before that.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxlora import lora
from jaxlora.checkpoints.peft import save_adapter
from jaxlora.checkpoints.save import save_model
from jaxlora.core.tree import flatten, unflatten
from jaxlora.lora import LoraConfig
from jaxlora.models.config import ModelConfig, Moe
from jaxlora.models.parameters import describe, init_params
from jaxlora.models.targets import targets_of_specs
from jaxlora.models.transformer import Transformer
from jaxlora.ops.attention_chunked import chunked_attention
from jaxlora.ops.experts import Routing
from jaxlora.ops.quantize import pack, quantize, quantize_tokens
from jaxlora.optim.optimizers import make_optimizer
from jaxlora.parallel.attention import on_each_device
from jaxlora.parallel.experts import on_each_device as experts_on_each_device
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.training.state import init_optimizer
from jaxlora.training.step import make_train_step

DENSE = ModelConfig(
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
MOE = dataclasses.replace(
    DENSE,
    mlp_dim=64,
    family="MixtralForCausalLM",
    sliding_window=5,
    sliding_layers=(0,),
    moe=Moe((0, 1), num_experts=8, mlp_dim=64, routing=Routing(2, renormalize=True)),
)
# Three times a power of two tokens: no activation has the size of a matrix.
ROWS, LENGTH = 8, 24


def model_of(method):
    """Config, specs and linear leaves of a method's model, and the method itself."""
    cfg = MOE if method.startswith("moe-") else DENSE
    specs = describe(cfg)
    linear = [path for path, spec in specs.items() if spec.kind in ("linear", "experts")]
    return cfg, specs, linear, method.removeprefix("moe-")


def batches(cfg, steps, accumulation):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, cfg.vocab_size, (accumulation, ROWS, LENGTH)).astype(np.int32)
        # Two texts in a row and padding: a segment crosses every border of devices.
        lengths = (10, LENGTH - 11, 1)
        segments = np.repeat(np.int32([1, 2, 0]), lengths)
        positions = np.concatenate(list(map(np.arange, lengths))).astype(np.int32)
        weights = (rng.random(tokens.shape) > 0.3) & (segments > 0)
        yield {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, -1),
            "weights": weights.astype(np.float32),
            "positions": np.broadcast_to(positions, tokens.shape),
            "segment_ids": np.broadcast_to(segments, tokens.shape),
        }


@functools.cache
def stored(method):
    """Base weights on the host, plain and as a run stores them: the linear ones quantized layer by
    layer; with int4 the tables too, in int8."""
    cfg, _, linear, storage = model_of(method)
    weights = flatten(init_params(cfg, jax.random.key(0), jnp.float32))
    plain = {path: np.asarray(weight) for path, weight in weights.items()}
    chosen = () if storage in ("lora", "full") else linear
    tables = {"embed/embedding": 0, "lm_head/kernel": 1} if storage == "int4" else {}
    kept = {path: quantize_tokens(plain[path], axis) for path, axis in tables.items()}
    return plain, plain | {path: quantized(plain[path], storage) for path in chosen} | kept


def quantized(weight, method):
    if weight.ndim > 2:
        parts = [quantized(each, method) for each in weight]
        return jax.tree.map(lambda *each: np.stack(list(map(np.asarray, each))), *parts)
    if method != "gptq":
        return quantize(weight, method.removeprefix("kernel-"))
    # As GPTQ files are read: packed, with zero points, each group's inputs anywhere.
    rng = np.random.default_rng(0)
    leaf = pack(quantize(weight, "int4", group_size=32))
    zeros = rng.integers(-1, 2, leaf.scales.shape).astype(np.int8)
    groups = rng.permutation(len(weight)).astype(np.int32) // 32
    return dataclasses.replace(leaf, zeros=zeros, groups=groups)


def setup(method, placement):
    """Returns the step, its first arguments, and how to export what it trains."""
    weights, leaves = stored(method)
    cfg, specs, linear, method = model_of(method)
    if method.startswith("kernel-"):
        ask = placement.kernel_for
        placement.kernel_for = lambda *leaf: ask(*leaf[:2], "TPU v6 lite") and "interpret"
    base = {
        path: placement.weight(leaf, specs[path].axes, stacked=specs[path].layers is not None)
        for path, leaf in leaves.items()
    }
    if method == "full":
        trainable, frozen, targets = {"params": base, "adapter": {}}, {}, {}
        options = None
    else:
        experts = [path for path in linear if specs[path].kind == "experts"]
        options = LoraConfig(
            r=4,
            alpha=8,
            dropout=0.0 if experts else 0.1,  # experts have none
            target_parameters=tuple(specs[path].modules()[0].split(".", 3)[3] for path in experts),
        )
        targets = targets_of_specs(specs, options)
        pairs = lora.init(unflatten(weights), targets, jax.random.key(1))
        adapter = {
            path: placement.adapter(pair, specs[path].axes, stacked=True)
            for path, pair in pairs.items()
        }
        trainable, frozen = {"params": {}, "adapter": adapter}, base
    every = jax.tree.map(lambda leaf: True, trainable)
    # Adam moves by the rate whatever the gradient: rounding of gradients near zero grows with it.
    # At 1e-2 losses of full fine-tuning are 4e-5 apart after 20 steps, at 1e-3 within 2e-5.
    rate = 1e-3 if method == "full" else 1e-2
    optimizer = make_optimizer("adamw", lambda step: rate, decayed=every, matrices=every)
    opt_state = init_optimizer(optimizer, trainable, placement)
    transformer = Transformer(
        cfg,
        remat="full",
        constrain=placement.constrain,
        attend=on_each_device(chunked_attention, placement),
        spread=experts_on_each_device(placement),
        context=placement.mesh.shape["context"],
    )
    like = (trainable, opt_state)
    step = make_train_step(transformer, targets, optimizer, jax.random.key(5), like)

    def export(trainable, folder):
        if options is None:
            whole = unflatten(trainable["params"])
            save_model(whole, cfg, folder, config={"architectures": [cfg.family]})
        else:
            save_adapter(
                folder, trainable["adapter"], targets, options, base_name="base", specs=specs
            )

    return step, trainable, opt_state, frozen, export


def exported(export, trainable):
    """``{name: array}`` of the files that a run would write."""
    with tempfile.TemporaryDirectory() as folder:
        export(trainable, Path(folder))
        (file,) = Path(folder).glob("*.safetensors")
        return load_file(file)


def gathers(program):
    """``[dtype, shape]`` of every all-gather of a compiled program."""
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather(?:-start)?\(", program)
    return sorted({(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found})


def share_of(leaf):
    return leaf.addressable_shards[0].data.size / leaf.size


def train(method, sizes, steps, accumulation):
    """Returns what happened, and the tensors that the run would export."""
    started = time.process_time()
    devices = jax.devices() if sizes else jax.devices()[:1]
    placement = Placement(make_mesh(sizes or None, devices))
    cfg, specs, linear, _ = model_of(method)
    step, trainable, opt_state, frozen, export = setup(method, placement)
    losses, program = [], None
    for number, batch in enumerate(batches(cfg, steps, accumulation)):
        arguments = (trainable, opt_state, frozen, placement.batch(batch), jnp.int32(number))
        program = program or step.lower(*arguments).compile()
        trainable, opt_state, metrics = step(*arguments)
        losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves((trainable, frozen))
    largest = max(leaves, key=lambda leaf: leaf.size)
    # A and B, and their moments.
    pairs = [x for x in jax.tree.leaves((trainable["adapter"], opt_state)) if x.ndim > 2]
    pairs = pairs if trainable["adapter"] else []
    tensors = exported(export, trainable)
    found = {
        "losses": losses,
        "gathers": gathers(program.as_text()),
        "compiled": step._cache_size(),
        "largest_share": share_of(largest),
        "pairs_share": max(map(share_of, pairs), default=0),
        "head": specs["lm_head/kernel"].shape,
        "matrices": sorted({specs[path].shape for path in linear}),
        "exported": {name: [str(x.dtype), *x.shape] for name, x in sorted(tensors.items())},
        "cpu_s": round(time.process_time() - started, 1),
    }
    return found, tensors


def apart(tensors, others):
    """Norm of the difference of two exports over the norm of one."""
    flat = [np.concatenate([x[name].ravel() for name in sorted(x)]) for x in (tensors, others)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


if __name__ == "__main__":
    numbers, alone = [int(word) for word in sys.argv[1:3]], {}
    for case in sys.argv[3:]:
        method, _, mesh = case.partition(":")
        pairs = [part.split("=") for part in mesh.split(",") if part]
        result, tensors = train(method, {axis: int(size) for axis, size in pairs}, *numbers)
        alone.setdefault(method, tensors)
        result["apart"] = apart(alone[method], tensors)
        print(json.dumps({case: result}), flush=True)
