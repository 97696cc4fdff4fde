"""A parameter is described once; init, sharding, loading, saving, quantization and LoRA read it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import FAMILIES
from jaxlora.models.families.row import head_tensor_of
from jaxlora.models.stacks import make_stacks

# What Hugging Face calls our leaves, unless a family's table names the leaf itself.
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter. Modules declare shape to `kind`; `describe` adds names and layers.

    Attributes:
      shape: logical shape of one layer's parameter, ``(in, out)`` for a matrix.
      axes: logical axis name of each dimension (`jaxlora.core.axes`).
      init: standard deviation of a normal initializer, or ``"ones"`` or ``"zeros"``.
      transposed: whether Hugging Face stores ``[out, in]``.
      kind: ``linear`` (may be quantized and adapted), ``experts`` (as linear, ``[E, in, out]``),
        ``router``, ``head``, ``embedding``, ``norm``, ``bias``, or ``buffer`` (no trained weight).
      parts: whether the first dimension of `shape` is over tensors of the checkpoint.
      hf_names: names in a checkpoint of the tensors that stand side by side along the last axis
        (nearly always one), with ``{layer}`` and ``{part}`` where there are several.
      module: Hugging Face's module path, as PEFT sees it, with ``{layer}`` where stacked.
      layers: numbers of the layers stacked on a leading axis, None if it stands alone.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: float | str
    transposed: bool = False
    kind: str = "linear"
    parts: bool = False
    hf_names: tuple[str, ...] = ()
    module: str = ""
    layers: tuple[int, ...] | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape as held in the parameter tree: ``[L, ...]`` when stacked."""
        return self.shape if self.layers is None else (len(self.layers), *self.shape)

    @property
    def size(self) -> int:
        """Number of elements over all layers."""
        return math.prod(self.full_shape)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of the checkpoint's tensors."""
        shape = self.shape[1:] if self.parts else self.shape
        shape = (*shape[:-1], shape[-1] // len(self.hf_names))
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape ``[..., in, out]`` of each of the checkpoint's tensors, as we hold it."""
        shape = self.tensor_shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def sources(self) -> dict[tuple[int, ...], tuple[str, ...]]:
        """Returns ``{index into the full array: tensor names side by side there}``.

        >>> spec = ParamSpec((4, 4), ("embed", "heads"), 0.02, hf_names=("h.{layer}.q.weight",),
        ...                  layers=(0, 1))
        >>> spec.sources()
        {(0,): ('h.0.q.weight',), (1,): ('h.1.q.weight',)}
        """
        layers = [None] if self.layers is None else self.layers
        parts = range(self.shape[0]) if self.parts else [None]
        return {
            (() if layer is None else (row,)) + (() if part is None else (part,)): tuple(
                name.format(layer=layer, part=part) for name in self.hf_names
            )
            for row, layer in enumerate(layers)
            for part in parts
        }

    def modules(self) -> list[str]:
        """Returns the Hugging Face module path of each layer, one path if not stacked."""
        layers = [None] if self.layers is None else self.layers
        return [self.module.format(layer=layer) for layer in layers]


def declare(spec: ParamSpec) -> nnx.Param[Any]:
    """Returns a module's parameter before it has a value: its description stands in its place."""
    return nnx.Param(spec)


def describe(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Returns ``{path: ParamSpec}`` for every parameter of the model, layers stacked."""
    from jaxlora.models.transformer import Transformer  # its modules are made of ParamSpecs

    specs = flatten(nnx.to_pure_dict(nnx.state(Transformer(cfg), nnx.Param)))
    layers = {
        name: numbers
        for stack in make_stacks(cfg)
        for name, numbers in zip(stack.names, stack.layers, strict=True)
    }
    return {path: _named(path, spec, cfg, layers) for path, spec in specs.items()}


def _named(path: str, spec: ParamSpec, cfg: ModelConfig, layers: dict) -> ParamSpec:
    """`spec` with its names by the family's table, by its layer numbers."""
    names = {**FAMILIES[cfg.family].names, **dict(cfg.renamed)}
    first, _, rest = path.partition("/")
    known = f"layers/{rest}" if first in layers else path
    module, _, leaf = known.rpartition("/")
    if known in names:  # a leaf with names of its own
        tensors = names[known]
        tensors = (tensors,) if isinstance(tensors, str) else tensors
    else:
        tensors = (f"{names[module]}.{_LEAF_NAMES[leaf]}",)
    # Of tensors that are one row each (norms of single heads) the module that holds them all.
    module = names.get(module) or tensors[0].rpartition(".")[0].removesuffix(".{part}")
    assert isinstance(module, str), module
    return dataclasses.replace(
        spec,
        hf_names=tensors,
        module=module,
        parts="{part}" in tensors[0],
        layers=layers.get(first),
    )


def head_tensor(cfg: ModelConfig) -> str:
    """Returns the name of the head's weight in a checkpoint, also where the embedding serves."""
    return head_tensor_of(FAMILIES[cfg.family])


def init_params(cfg: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Tree:
    """Returns fresh parameters, for training from scratch and for tests."""
    specs = describe(cfg)
    keys = dict(zip(sorted(specs), jax.random.split(key, len(specs)), strict=True))

    def fresh(path: str, spec: ParamSpec) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(spec.full_shape, dtype)
        if spec.init == "zeros":
            return jnp.zeros(spec.full_shape, dtype)
        assert not isinstance(spec.init, str), spec.init
        return (spec.init * jax.random.normal(keys[path], spec.full_shape)).astype(dtype)

    return unflatten({path: fresh(path, spec) for path, spec in specs.items()})
