"""One matrix from a file, plain or quantized, and its place in the leaf of its stack."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlora.checkpoints.copying import aligned, copy
from jaxlora.checkpoints.regions import Region
from jaxlora.checkpoints.storage import Storage
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.axes import VOCAB
from jaxlora.core.errors import UserError
from jaxlora.models.parameters import ParamSpec
from jaxlora.ops.arrays import FOUR_BIT, QuantizedArray
from jaxlora.ops.quantize import beside, dequantize, pack, quantize, quantize_tokens

# The kinds of parameter that `QuantSpec` is for.
_QUANTIZED = ("linear", "experts")
Split = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How the frozen weights of a model are stored; see `jaxlora.ops.quantize`.

    Attributes:
      format: of linear weights: ``int4``, ``nf4`` or ``int8``.
      group_size: int4 only.
      double_quant: nf4 only.
      embeddings: of embedding and head: ``int8``; None keeps them plain.
    """

    format: str
    group_size: int = 64
    double_quant: bool = True
    embeddings: str | None = None

    def of(self, spec: ParamSpec) -> str | None:
        """Returns the format of a parameter, None for one that is kept plain."""
        if spec.kind in _QUANTIZED:
            return self.format
        return self.embeddings if is_table(spec) else None


def is_table(spec: ParamSpec) -> bool:
    """Returns whether a parameter is an embedding of tokens, or a head."""
    return spec.kind in ("embedding", "head") and VOCAB in spec.axes


def stored_table(table: np.ndarray, spec: ParamSpec) -> QuantizedArray:
    """Returns an embedding or a head in int8.

    >>> spec = ParamSpec((4, 8), ("embed", "vocab"), 0.02, kind="head")
    >>> stored_table(np.ones((4, 8), "float32"), spec).scales.shape
    (1, 8)
    """
    return quantize_tokens(table, spec.axes.index(VOCAB))


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads matrices as a model wants them.

    Attributes:
      files: where from.
      dtype: of plain leaves, and the one that what is quantized here stands for.
      quantization: how to store plain linear weights, None for as they are.
      embeddings: how to store embedding and head, None for as they are.
      storage: how quantized weights lie in the files.
    """

    files: Tensors
    dtype: np.dtype
    quantization: QuantSpec | None
    storage: Storage | None
    embeddings: str | None = None

    def size(self, spec: ParamSpec) -> float:
        """Returns about how many bytes the leaf of a parameter will take."""
        stored = self.storage or (spec.kind in _QUANTIZED and self.quantization)
        if stored and spec.kind in _QUANTIZED:
            return spec.size * (0.5 if stored.format in FOUR_BIT else 1)
        if self.embeddings and is_table(spec):
            return spec.size
        return spec.size * self.dtype.itemsize

    def matrix(
        self,
        names: tuple[str, ...],
        spec: ParamSpec,
        *,
        plain: bool = False,
        split: Split | None = None,
        region: Region | None = None,
    ) -> Any:
        """Returns one matrix ``[in, out]``: a host leaf, or an array in the dtype of the file.

        Args:
          names: tensors that stand side by side along the last axis.
          spec: the parameter they belong to.
          plain: dequantize what is quantized in the files.
          split: given a plain linear matrix and what stores one, returns the leaf.
          region: from `settled`: the part of the matrix to return; None for all.

        Raises:
          UserError: damaged files, values that cannot be quantized.
        """
        tensors = [self._tensor(name, spec, plain) for name in names]
        if isinstance(tensors[0], QuantizedArray):
            with_names = zip(names[1:], tensors[1:], strict=True)
            return functools.reduce(self._beside, with_names, tensors[0])
        matrix = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=-1)
        matrix = matrix if region is None else region.of(matrix)
        store = functools.partial(self._store, spec)
        try:
            if split is not None and spec.kind == "linear":
                return split(matrix, store=store)
            return store(matrix)
        except UserError as error:
            raise UserError(f"{self.files.info[names[0]].file}: {names[0]}: {error}") from error

    def settled(
        self, region: Region | None, names: tuple[str, ...], spec: ParamSpec, *, plain: bool
    ) -> Region | None:
        """Returns the part of a matrix that can be read alone and holds `region`; None for all.

        Files are mapped: what is not in it is not read.
        """
        stored = self.storage is not None and self.storage.holds(names[0], self.files.info)
        if region is None or stored:
            return None
        if self.embeddings and is_table(spec) and not plain:
            return region.along(spec.axes.index(VOCAB))
        if self.quantization is not None and spec.kind in _QUANTIZED and not plain:
            spec_of = self.quantization
            region = region.quantized(
                spec_of.format, spec_of.group_size, double_quant=spec_of.double_quant
            )
        return None if region.is_whole else region

    def _store(self, spec: ParamSpec, matrix: np.ndarray) -> Any:
        """Quantized if the parameter is to be, else in the dtype of the file."""
        if self.embeddings and is_table(spec):
            return stored_table(matrix, spec)
        if self.quantization is None or spec.kind not in _QUANTIZED:
            return matrix
        how = self.quantization
        return _quantized(
            matrix,
            self.dtype.name,
            format=how.format,
            group_size=how.group_size,
            double_quant=how.double_quant,
        )

    def _tensor(self, name: str, spec: ParamSpec, plain: bool) -> Any:
        if self.storage is not None and self.storage.holds(name, self.files.info):
            assert isinstance(self.files, TensorFiles), "views are of plain weights"
            leaf = self.storage.load(self.files, name, spec.matrix_shape)
            return np.asarray(_dequantize(leaf, self.dtype)) if plain else leaf
        tensor = self.files.read(name)
        return np.swapaxes(tensor, -1, -2) if spec.transposed else tensor

    def _beside(self, left: QuantizedArray, named: tuple[str, QuantizedArray]) -> QuantizedArray:
        name, right = named
        try:
            return beside(left, right)
        except UserError as error:
            raise UserError(f"{self.files.folder}: {name}: {error}") from error


_dequantize = jax.jit(dequantize, static_argnums=1)


def _quantized(matrix: np.ndarray, dtype: str, **options: Any) -> Any:
    if matrix.ndim == 2:
        return pack(quantize(matrix, dtype=dtype, **options))
    each = [_quantized(expert, dtype, **options) for expert in matrix]
    return jax.tree.map(lambda *parts: np.stack(parts), *each)


def empty(part: Any, lead: tuple[int, ...], dtype: np.dtype, region: Region | None = None) -> Any:
    """Returns host buffers for a whole leaf of which `part` is one of ``[*lead]``.

    `region` says which box of the matrix `part` is; None: all of it.
    """

    def shape(x: np.ndarray) -> tuple[int, ...]:
        return lead + (x.shape if region is None else region.full_shape(part, x))

    if isinstance(part, np.ndarray):
        return aligned(shape(part), dtype)
    return jax.tree.map(lambda x: aligned(shape(x), x.dtype), part)


def put(
    leaf: Any, at: tuple[int, ...], part: Any, where: str, region: Region | None = None
) -> None:
    """Writes one matrix, or the `region` of it that `part` is, to its place in the leaf.

    Raises:
      UserError: it is quantized in another way than the first one was; `where` says which it is.
    """
    whole, pieces = jax.tree.flatten(leaf), jax.tree.flatten(part)
    places = [(*at, ...) if region is None else (*at, *region.index(part, y)) for y in pieces[0]]
    alike = whole[1] == pieces[1] and all(
        x[place].shape == y.shape and (isinstance(leaf, np.ndarray) or x.dtype == y.dtype)
        for x, y, place in zip(whole[0], pieces[0], places, strict=True)
    )
    if not alike:
        raise UserError(
            f"{where} is quantized with other options than the same matrix of other layers; "
            "jaxlora stores the layers of a stack alike: use the unquantized model."
        )
    for target, source, place in zip(whole[0], pieces[0], places, strict=True):
        copy(target[place], source)
