"""Leaves that train with all their numbers: whole, or some layers or rows of them.

`whole_modules` and `token_rows` follow PEFT's ``modules_to_save`` and ``trainable_token_indices``;
both give ``{leaf path: Part}``, as does `jaxlora.lora.unfrozen`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxlora.core.axes import VOCAB
from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.ops.arrays import PatchedArray
from jaxlora.ops.matmul import materialize


class Described(Protocol):
    """What the rules need to know of a parameter: `jaxlora.models.parameters.ParamSpec` has it."""

    @property
    def kind(self) -> str:
        """What the parameter is: linear, experts, head, embedding, norm, bias and others."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer's parameter."""
        ...

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axis of each dimension."""
        ...

    @property
    def transposed(self) -> bool:
        """Whether Hugging Face's tensor has its axes the other way round."""
        ...

    @property
    def layers(self) -> Any:
        """None if the leaf is not stacked."""
        ...

    def modules(self) -> list[str]:
        """Module path of each layer."""
        ...

    def sources(self) -> Mapping[tuple[int, ...], Sequence[str]]:
        """Tensor names by index into the full array."""
        ...


_Spec = TypeVar("_Spec", bound=Described)


@dataclasses.dataclass(frozen=True)
class Part:
    """What of one leaf trains.

    Attributes:
      stacked: whether the leaf has a leading layer axis.
      layers: positions on it, ascending; None: all of them.
      rows: indices on `axis`, ascending; None: all. Never together with `layers`.
      axis: axis of the leaf that Hugging Face has first in one layer's tensor.
      by_token: the rows are those of the vocabulary.
    """

    stacked: bool = False
    layers: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    axis: int = 0
    by_token: bool = False

    @property
    def whole(self) -> bool:
        """Whether every number of the leaf trains."""
        return self.layers is None and self.rows is None

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        """Shape of what trains, given the shape of the leaf."""
        index, axis = self._where()
        shape = list(full)
        if index is not None:
            shape[axis] = len(index)
        return tuple(shape)

    def take(self, leaf: Any) -> Any:
        """Returns what trains of a plain leaf, on the host or on a device."""
        index, axis = self._where()
        if index is None:
            return leaf
        return leaf[(slice(None),) * (axis % leaf.ndim) + (np.asarray(index),)]

    def hole(self, base: Any) -> PatchedArray:
        """Returns the frozen leaf, to be filled with what trains."""
        index, axis = self._where()
        assert index is not None, "what trains whole leaves nothing frozen"
        return PatchedArray(base, None, np.asarray(index, np.int32), axis, self.by_token)

    def axes(self, logical: Sequence[str]) -> tuple[str | None, ...]:
        """Logical axes of what trains of one layer, given those of the whole."""
        named: list[str | None] = list(logical)
        if self.rows is not None:
            named[self.axis] = None
        return tuple(named)

    def _where(self) -> tuple[tuple[int, ...] | None, int]:
        return (self.rows, self.axis) if self.layers is None else (self.layers, 0)


Parts = dict[str, Part]


def fill(frozen: Any, value: Any) -> Any:
    """Returns the leaf a model computes with.

    Args:
      frozen: the hole `Part.hole` made, or None if the whole leaf trains.
      value: what trains.
    """
    if frozen is None:
        return value
    filled = dataclasses.replace(frozen, patch=value)
    return filled if filled.by_token else materialize(filled)


def whole_modules(specs: Mapping[str, Described], suffixes: Sequence[str]) -> Parts:
    """Returns the parameters in the modules that PEFT's ``modules_to_save`` would train.

    A name selects every module whose path *ends* in it (``norm`` takes ``input_layernorm`` too) and
    all that is inside.

    Raises:
      UserError: a name that selects nothing, with the nearest.
    """
    parts: Parts = {}
    used: set[str] = set()
    for path, spec in specs.items():
        chosen = []
        for position, module in enumerate(spec.modules()):
            hits = {s for s in suffixes if any(m.endswith(s) for m in _with_parents(module))}
            used |= hits
            chosen += [position] if hits else []
        if chosen and len(tensors_of_layers(spec)[0]) > 1:
            raise UserError(
                f"lora_modules_to_save: {spec.modules()[chosen[0]]} is made up of several tensors, "
                "which cannot be saved in its place; leave it out, or train without an adapter."
            )
        if chosen:
            parts[path] = of_layers(spec, chosen)
    for suffix in suffixes:
        if suffix not in used:
            known = sorted({m.rpartition(".")[2] for s in specs.values() for m in s.modules()})
            raise UserError(
                f"lora_modules_to_save: {suffix!r} matches no module."
                f"{did_you_mean(suffix.rpartition('.')[2], known)} Modules: {', '.join(known)}."
            )
    return parts


def vocabulary_leaves(specs: Mapping[str, _Spec]) -> dict[str, _Spec]:
    """Returns what has a row for every token: the tables, and the bias of the head."""
    return {path: spec for path, spec in specs.items() if VOCAB in spec.axes}


def vocabulary_tables(specs: Mapping[str, _Spec]) -> dict[str, _Spec]:
    """Returns the embedding of the tokens, and the head where it has numbers of its own."""
    return {
        path: spec
        for path, spec in vocabulary_leaves(specs).items()
        if spec.kind in ("embedding", "head")
    }


def token_rows(
    specs: Mapping[str, Described], tokens: Sequence[int] | Mapping[str, Sequence[int]]
) -> Parts:
    """Returns the rows that PEFT's ``trainable_token_indices`` would train.

    Args:
      specs: every parameter.
      tokens: ids in the embedding, or ``{module name: ids}``.

    Raises:
      UserError: a module that is no table of the vocabulary, an id beyond it, an id given twice.
    """
    tables = vocabulary_tables(specs)
    if not isinstance(tokens, Mapping):
        tokens = {next(s for s in tables.values() if s.kind == "embedding").modules()[0]: tokens}
    parts: Parts = {}
    for name, ids in tokens.items():
        paths = [p for p, s in tables.items() if s.modules()[0].endswith(name)]
        if not paths:
            known = ", ".join(spec.modules()[0].rpartition(".")[2] for spec in tables.values())
            raise UserError(
                f"peft_trainable_token_indices: {name!r} is no table of the vocabulary; expected "
                f"one of {known}."
            )
        for path in paths:
            axis = 1 if tables[path].transposed else 0
            _check_ids(ids, tables[path].shape[axis])
            parts[path] = Part(rows=tuple(sorted(ids)), axis=axis, by_token=True)
    return parts


def _check_ids(ids: Sequence[int], size: int) -> None:
    key = "peft_trainable_token_indices"
    for token in ids:
        if not 0 <= token < size:
            raise UserError(f"{key}: there is no token {token}; expected 0 to {size - 1}.")
    if len(set(ids)) < len(ids):
        raise UserError(f"{key}: a token is given twice; list each once.")


def of_layers(spec: Described, positions: Sequence[int]) -> Part:
    """Returns the part of a leaf that is some of its layers, whole."""
    every = len(positions) == len(spec.modules())
    return Part(spec.layers is not None, None if every else tuple(positions))


def tensors_of_layers(spec: Described) -> list[list[str]]:
    """Returns the names of the tensors of each layer."""
    named: list[list[str]] = [[] for _ in spec.modules()]
    for at, names in spec.sources().items():
        named[at[0] if spec.layers is not None else 0] += names
    return named


def _with_parents(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]
