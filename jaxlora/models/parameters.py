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


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
      shape: logical shape of one layer's parameter, ``(in, out)`` for a matrix.
      axes: logical axis name of each dimension (`jaxlora.core.axes`).
      init: standard deviation of a normal initializer, or ``"ones"`` or ``"zeros"``.
      hf_name: its tensor name in a Hugging Face checkpoint, with ``{layer}`` where stacked.
      transposed: whether Hugging Face stores ``[out, in]``.
      kind: ``linear`` (may be quantized and adapted), ``head``, ``embedding``, ``norm``
        or ``bias``.
      layers: number of layers stacked on a leading axis, None if it stands alone.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: float | str
    hf_name: str
    transposed: bool = False
    kind: str = "linear"
    layers: int | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape as held in the parameter tree: ``[L, ...]`` when stacked."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def size(self) -> int:
        """Number of elements over all layers."""
        return math.prod(self.full_shape)

    def hf_names(self) -> list[str]:
        """Returns the checkpoint tensor name of each layer, one name if not stacked."""
        if self.layers is None:
            return [self.hf_name]
        return [self.hf_name.format(layer=layer) for layer in range(self.layers)]

    def modules(self) -> list[str]:
        """Returns the Hugging Face module path of each layer (the tensor name less its last part).

        >>> ParamSpec((4, 4), ("embed", "heads"), 0.02, "layers.{layer}.q_proj.weight", layers=2
        ...           ).modules()
        ['layers.0.q_proj', 'layers.1.q_proj']
        """
        return [name.rpartition(".")[0] for name in self.hf_names()]


def declare(spec: ParamSpec) -> nnx.Param[Any]:
    """Returns a module's parameter before it has a value: its description stands in its place."""
    return nnx.Param(spec)


def describe(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Returns ``{path: ParamSpec}`` for every parameter of the transformer, layers stacked."""
    from jaxlora.models.transformer import Transformer  # its modules are made of ParamSpecs

    state = nnx.state(Transformer(cfg), nnx.Param)
    specs = flatten(nnx.to_pure_dict(state))
    return {
        path: dataclasses.replace(spec, layers=cfg.num_layers)
        if path.startswith("layers/")
        else spec
        for path, spec in specs.items()
    }


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
