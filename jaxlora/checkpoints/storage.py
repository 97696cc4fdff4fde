"""How somebody else's quantized weight lies in a file: which tensors, and what they mean."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.checkpoints.tensors import TensorFiles, TensorInfo
from jaxlora.core.errors import UserError
from jaxlora.ops.arrays import QuantizedArray

Shape = tuple[int, ...]
Tensors = Mapping[str, Any]  # None for an absent part


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the tensors that store a weight.

    Attributes:
      dtypes: safetensors' words for the dtypes it may have.
      shape: its shape, None where only its bytes are known.
      size: its bytes, where the shape is not known.
      optional: may be absent.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    size: int | None = None
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Storage:
    """One way of storing quantized linear weights.

    Attributes:
      name: for messages, e.g. ``"bitsandbytes nf4"``.
      format: of the leaves it gives, see `QuantizedArray`.
      marker: the tensor that tells a quantized weight from a plain one, ``{}`` being its module.
      parts: ``(in, out) -> {tensor name with {} for the module: Part}``.
      read: from the tensors by those names (None if absent) and ``(in, out)`` to a host leaf.
      axes: of the weights that are stored so: 2, or 3 for all experts of a layer in one.
    """

    name: str
    format: str
    marker: str
    parts: Callable[[Shape], dict[str, Part]]
    read: Callable[[Tensors, Shape], QuantizedArray]
    axes: int = 2

    def holds(self, weight: str, info: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensor name `weight` stands for a quantized matrix in these files."""
        return self.marker_of(weight) in info

    def marker_of(self, weight: str) -> str:
        """Returns the name of the tensor that tells whether `weight` is quantized."""
        return self.marker.format(_module(weight))

    def tensors(self, weight: str, shape: Shape, info: Mapping[str, TensorInfo]) -> dict[str, str]:
        """Returns ``{part: tensor name}`` of a quantized weight, checked against the headers.

        Raises:
          UserError: a part is missing or has another shape or dtype.
        """
        found = {}
        for part, wanted in self.parts(shape).items():
            name = part.format(_module(weight))
            if name not in info:
                if wanted.optional:
                    continue
                marker = self.marker_of(weight)
                raise UserError(
                    f"{info[marker].file}: {name} is missing beside {marker} ({self.name}); "
                    "download the model again."
                )
            _check_part(name, info[name], wanted, self.name)
            found[part] = name
        return found

    def load(self, files: TensorFiles, weight: str, shape: Shape) -> QuantizedArray:
        """Reads one quantized matrix ``(in, out)``, or one for each expert.

        Raises:
          UserError: damaged files, or contents that contradict each other, named.
        """
        names = self.tensors(weight, shape, files.info)
        parts = {
            part: files.read_raw(names[part]) if part in names else None
            for part in self.parts(shape)
        }
        try:
            leaf = self.read(parts, shape)
            if leaf.shape != shape:
                raise UserError(f"holds {list(leaf.shape)} values; expected {list(shape)}")
        except UserError as error:
            where = f"{files.info[names[self.marker]].file}: {_module(weight)}.weight"
            raise UserError(f"{where}: {error}.") from error
        return leaf


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8, "F64": 8}


def _check_part(name: str, info: TensorInfo, wanted: Part, storage: str) -> None:
    if info.dtype not in wanted.dtypes:
        raise UserError(
            f"{info.file}: {name} has dtype {info.dtype}; expected {' or '.join(wanted.dtypes)} "
            f"({storage}); download the model again."
        )
    size = math.prod(info.shape) * _BYTES[info.dtype]
    if wanted.shape is not None and info.shape != wanted.shape:
        raise UserError(
            f"{info.file}: {name} has shape {list(info.shape)}; expected {list(wanted.shape)} by "
            f"config.json ({storage}); use the config.json that belongs to these weights."
        )
    if wanted.size is not None and size != wanted.size:
        raise UserError(
            f"{info.file}: {name} has {size} bytes; expected {wanted.size} by config.json "
            f"({storage}); use the config.json that belongs to these weights."
        )
