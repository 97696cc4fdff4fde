"""What a layer of Llama-3-8B costs a TPU, by libtpu's own estimate of every operation's cycles.

    python benchmarks/tpu_cycles.py [--chip v6e] [--tokens 2048] [--mlp] CASE ...

CASE is STORAGE:RANK, for example int4:16; STORAGE is bf16, int4, nf4 or int8, with ``-first``
behind it for a matrix that a kernel dequantizes before the product, ``-xla`` for one that XLA does.
Nothing runs and no TPU is needed: the forward pass and the backward pass of four layers (all of a
layer computed again) are compiled, attention left out. For a kernel libtpu says nothing here; it
counts as the larger of the cycles of its instructions (`tpu_kernels`) and of its bytes at the
memory's bandwidth. These are estimates: they rank programs, and are not times.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlora.planning.topology import environment, parse

if __name__ == "__main__":  # libtpu reads these when JAX first looks for it
    os.environ.update(environment(parse("v5e:1x1"), os.environ))

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.stages import Compiled
from tpu_kernels import CHIPS, CYCLES, cycles_of, measured

from jaxlora import lora
from jaxlora.checkpoints.load import QuantSpec
from jaxlora.core.tree import unflatten
from jaxlora.lora import LoraConfig
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import ParamSpec, describe
from jaxlora.models.targets import targets_of_specs
from jaxlora.models.transformer import Transformer, bind
from jaxlora.ops.matmul import matmul
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.planning.hlo import Array, Instruction, Module, arrays_of
from jaxlora.planning.leaves import host_leaf, note

LAYERS = 4
ROW = 2048
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
KINDS = ("products", "narrow products", "unpacking", "other")


def placement_on(chip: str) -> Placement:
    """Returns where arrays would live on one chip that is not here."""
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:1x1", chips_per_host_bounds=[1, 1, 1]
    )
    return Placement(make_mesh(None, described.devices[:1]), note)


def compile_layers(placement: Placement, storage: str, rank: int, tokens: int) -> Compiled:
    """Returns the compiled gradient of four layers."""
    cfg = read_config(MODEL)
    model = Transformer(cfg, dtype=jnp.bfloat16, remat="full", attend=_no_attention)
    specs = describe(cfg)
    frozen = {path: _placed(placement, spec, storage) for path, spec in specs.items()}
    targets = targets_of_specs(specs, LoraConfig(r=rank, alpha=rank)) if rank else {}
    table = _array(placement, frozen.pop("embed/embedding").shape, jnp.float32)
    pairs = {
        path: {
            "a": _array(placement, (LAYERS, specs[path].shape[0], rank), jnp.float32),
            "b": _array(placement, (LAYERS, rank, specs[path].shape[1]), jnp.float32),
        }
        for path in targets
    }

    def loss(trained, frozen, tokens):
        params = unflatten({**frozen, "embed/embedding": trained[0]})
        params = lora.apply(params, trained[1], targets) if targets else params
        hidden, _ = bind(model, params)(tokens, tokens, tokens)
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    batch = _array(placement, (tokens // ROW, ROW), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).lower((table, pairs), frozen, batch)
    return lowered.compile()


def compile_mlp(placement: Placement, storage: str, tokens: int) -> Compiled:
    """Returns the compiled gradient of four layers of `up` and `down`, no adapter."""
    specs = describe(read_config(MODEL))
    up, down = (
        _placed(placement, specs[f"layers/mlp/{name}_proj/kernel"], storage)
        for name in ("up", "down")
    )

    def loss(x, weights):
        def layer(x, weights):
            up, down = weights
            return x + matmul(jax.nn.silu(matmul(x, up)), down), None

        y, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    x = _array(placement, (tokens, MODEL["hidden_size"]), jnp.bfloat16)
    return jax.jit(jax.grad(loss)).lower(x, (up, down)).compile()


class _ByXla(Placement):
    def kernel_for(self, leaf: Any, logical: Any, chip: str) -> str:
        return ""


def _placed(placement: Placement, spec: ParamSpec, storage: str) -> Any:
    name, _, by = storage.partition("-")
    own = _ByXla(placement.mesh, note) if by == "xla" else placement
    leaf = own.weight(_stored(spec, name), spec.axes, stacked=spec.layers is not None)
    return dataclasses.replace(leaf, product=False) if by == "first" else leaf


def _stored(spec: ParamSpec, storage: str) -> Any:
    how = None if storage == "bf16" else QuantSpec(storage)
    return host_leaf(spec, how, jnp.dtype(jnp.bfloat16))


def _array(placement: Placement, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    whole = placement.sharding((None,) * len(shape), shape)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)


def _no_attention(q, k, v, visible, **options):
    return q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)


def kinds_of(text: str, chip: str, known: dict[str, Any]) -> dict[str, list[int]]:
    """Returns cycles of one layer, forward and backward, by kind of operation.

    Args:
      text: of a compiled program.
      chip: key of `CHIPS`.
      known: of kernels, by `tpu_kernels`.
    """
    module = Module(text)
    found = {kind: [0, 0] for kind in KINDS}
    bodies = [name for name in module.computations if module.runs.get(name, 0) >= LAYERS]
    for name in bodies:
        lines = module.computations[name]
        types_of = {each.name: each.type for each in lines}
        backward = any("transpose(jvp" in each.line for each in lines)
        for each in lines:
            if "tpu_custom_call" in each.line:
                called = each.name.partition(".")[0]
                kind = "products" if "product" in called else "unpacking"
                types = [each.type, *(types_of[name] for name in _operands(each))]
                arrays = [arrays_of(type_)[0] for type_ in types]
                found[kind][backward] += cycles_of(called, arrays, chip, known)
            elif estimate := CYCLES.search(each.line):
                found[_kind(module, each)][backward] += int(estimate[1])
    return found


def _operands(call: Instruction) -> list[str]:
    inside = re.search(r"custom-call\(([^)]*)\)", call.line)
    return re.findall(r"%([\w.\-]+)", inside[1]) if inside else []


def _kind(module: Module, found: Instruction) -> str:
    inside = list(_inside(module, found))
    arrays = [array for each in (found, *inside) for array in arrays_of(each.type)]
    reads_matrix = any(map(_is_matrix, arrays))
    if any(each.opcode == "convolution" for each in inside):
        return "products" if reads_matrix else "narrow products"
    return "unpacking" if reads_matrix else "other"


def _is_matrix(array: Array) -> bool:
    width, hidden = MODEL["hidden_size"], MODEL["intermediate_size"]
    sizes = {width * hidden, width * width, width * width // 4}
    if array.dtype in ("s4", "u4", "s8", "u8"):
        sizes |= {size // 2 for size in sizes}
    return array.size in sizes | {size * LAYERS for size in sizes}


def _inside(module: Module, found: Instruction) -> Iterator[Instruction]:
    for name in re.findall(r"calls=%?([\w.\-]+)", found.line):
        for each in module.computations.get(name, ()):
            yield each
            yield from _inside(module, each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--chip", choices=CHIPS, default="v6e")
    parser.add_argument("--tokens", type=int, default=ROW)
    parser.add_argument("--mlp", action="store_true", help="only up and down, without an adapter")
    parser.add_argument("--keep", help="folder for the compiled programs' text")
    options = parser.parse_args()
    placement = placement_on(options.chip)
    formats = {re.split("[:-]", case)[0] for case in options.cases} & {"int4", "nf4"}
    known = measured(options.chip, min(options.tokens, 2048), sorted(formats))
    print(
        f"# a million cycles of a layer, {options.chip}, {options.tokens} tokens, kernels {known}"
    )
    print("| case | pass | " + " | ".join(KINDS) + " | all | scratch, MiB |")
    print("| --- | --- |" + " ---: |" * (len(KINDS) + 2))
    for case in options.cases:
        storage, _, rank = case.partition(":")
        if options.mlp:
            compiled = compile_mlp(placement, storage, options.tokens)
        else:
            compiled = compile_layers(placement, storage, int(rank or 0), options.tokens)
        text = compiled.as_text() or ""
        memory: Any = compiled.memory_analysis()
        scratch = memory.temp_size_in_bytes / 2**20
        if options.keep:
            Path(options.keep, f"{options.chip}-{case}-{options.tokens}.hlo").write_text(text)
        found = kinds_of(text, options.chip, known)
        for number, name in enumerate(("forward", "backward")):
            cycles = [found[kind][number] / 1e6 for kind in KINDS]
            row = " | ".join(f"{each:.2f}" for each in (*cycles, sum(cycles)))
            print(f"| {case} | {name} | {row} | {scratch:.0f} |", flush=True)


if __name__ == "__main__":
    main()
