"""Tensor files under other names: how somebody else's layout looks like the one we read."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxlora.checkpoints.tensors import TensorInfo


class Tensors(Protocol):
    """What loading needs of a set of tensors; `TensorFiles` and `TensorView` have it."""

    folder: Path
    info: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tensor of a view comes from.

    Attributes:
      name: its name in the files.
      change: what makes the wanted values of the stored ones; None: they are the same.
      transposes: whether `change` turns ``[a, b]`` into ``[b, a]``; it keeps the shape otherwise.
    """

    name: str
    change: Callable[[np.ndarray], np.ndarray] | None = None
    transposes: bool = False


class TensorView:
    """The tensors of `files` by the names of `sources`.

    >>> from jaxlora.checkpoints.tensors import TensorInfo
    >>> class Two:
    ...     folder, metadata = Path(), {}
    ...     info = {"x": TensorInfo(Path(), "F32", (1, 2))}
    ...     def read(self, name, rows=None):
    ...         return np.ones((1, 2), np.float32)
    >>> view = TensorView(Two(), {"y": Source("x", np.transpose, transposes=True)})
    >>> view.info["y"].shape, view.read("y").shape
    ((2, 1), (2, 1))
    """

    def __init__(self, files: Tensors, sources: Mapping[str, Source]):
        self.folder = files.folder
        self.metadata = files.metadata
        self.info = {
            name: _info(files.info[source.name], source) for name, source in sources.items()
        }
        self._files, self._sources = files, sources

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a tensor, or only `rows` of its first axis."""
        source = self._sources[name]
        if source.change is None:
            return self._files.read(source.name, rows)
        values = source.change(self._files.read(source.name))
        return values if rows is None else values[rows]


def _info(stored: TensorInfo, source: Source) -> TensorInfo:
    shape = stored.shape[::-1] if source.transposes else stored.shape
    return dataclasses.replace(stored, shape=shape)
