"""The tensors of a safetensors folder by name, one file or many shards; read only when asked."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.core.errors import UserError

FLOAT_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# Of tensors that are no floats: what quantized weights are stored in.
_RAW_DTYPES: dict[str, Any] = FLOAT_DTYPES | {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like; `dtype` is safetensors' word, e.g. ``"BF16"``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorFiles:
    """Opens ``<stem>.safetensors``, or the shards that ``<stem>.safetensors.index.json`` names.

    Attributes:
      info: ``{tensor name: TensorInfo}``, from the headers alone.
      metadata: the free-text metadata of the files.

    Raises:
      UserError: no such file, a missing, truncated or damaged shard, an index that names a tensor
        its shard does not hold or a file outside the folder, a tensor stored twice, pickles only.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder = Path(folder)
        self.info: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        single, index = (self.folder / f"{stem}.safetensors{end}" for end in ("", ".index.json"))
        if single.is_file():
            self._add(single, [])
        elif index.is_file():
            shards = _read_index(index)
            for file, names in shards.items():
                self._add(self.folder / file, names)
        else:
            raise UserError(_nothing_found(self.folder, stem))

    def _add(self, file: Path, expected: list[str]) -> None:
        if not file.is_file():
            raise UserError(
                f"{file}: shard is missing, the index expects {expected[0]} and "
                f"{len(expected) - 1} more tensors in it; download or copy it again."
            )
        try:
            with safe_open(file, framework="np") as opened:
                self.metadata.update(opened.metadata() or {})
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                infos = {
                    name: TensorInfo(file, view.get_dtype(), tuple(view.get_shape()))
                    for name, view in found.items()
                }
            extents = _extents(file)
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(file, error)) from error
        for name in expected:
            if name not in infos:
                raise UserError(
                    f"{file}: {name} is not in this shard, though the index says so; download "
                    "the index and the shards again."
                )
        for name, info in infos.items():
            if name in self.info:
                raise UserError(
                    f"{file}: {name} is also in {self.info[name].file.name}; expected every "
                    "tensor once; remove shards that do not belong to this model."
                )
            self.info[name] = info
            self._starts[name] = extents[name][0]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a tensor, or only `rows` of its first axis, in the dtype of the file; read-only.

        Raises:
          UserError: the dtype is no float, or the file has been damaged since it was opened.
        """
        info = self.info[name]
        if info.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{info.file}: {name} has dtype {info.dtype}; expected "
                f"{', '.join(FLOAT_DTYPES)}; use the repository of the unquantized model."
            )
        return self._read(name, rows)

    def read_raw(self, name: str) -> np.ndarray:
        """Returns a tensor of any dtype that quantized weights are stored in; read-only.

        Raises:
          UserError: the file has been damaged since it was opened.
        """
        return self._read(name, None)

    def _read(self, name: str, rows: slice | None) -> np.ndarray:
        info = self.info[name]
        dtype = np.dtype(_RAW_DTYPES[info.dtype])
        if not info.size:
            return np.empty(info.shape, dtype)
        try:
            # Mapped anew each time: what has been read does not stay in memory.
            mapped = np.memmap(
                info.file, np.uint8, "r", self._starts[name], info.size * dtype.itemsize
            )
        except (ValueError, OSError) as error:
            raise UserError(_damaged(info.file, error)) from error
        values = np.asarray(mapped).view(dtype).reshape(info.shape)
        return values if rows is None or not info.shape else values[rows]


def _read_index(index: Path) -> dict[str, list[str]]:
    """Returns ``{shard file name: tensor names}``, checked."""
    try:
        weight_map = json.loads(
            index.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates
        )["weight_map"]
        entries = list(weight_map.items())
    except UserError as error:
        raise UserError(f"{index}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{index}: expected JSON with an object "weight_map" ({error}); download it again.'
        ) from error
    shards: dict[str, list[str]] = {}
    for name, file in entries:
        # A name like ../../x would read a file of someone else's choosing.
        plain = isinstance(file, str) and file.endswith(".safetensors")
        if not plain or "/" in file or "\\" in file:
            raise UserError(
                f"{index}: weight_map sends {name} to {file!r}; expected the name of a "
                ".safetensors file in the same folder."
            )
        shards.setdefault(file, []).append(name)
    if not shards:
        raise UserError(f"{index}: weight_map is empty; download it again.")
    return shards


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is listed twice; expected every tensor once.")
    return content


def _nothing_found(folder: Path, stem: str) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; expected one that holds {stem}.safetensors."
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        return (
            f"{folder}: only {pickled[0]} found, and jaxlora never unpickles files; convert it to "
            "safetensors (load it and call save_pretrained in transformers or PEFT)."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"found only {', '.join(others[:3])}" if others else "no safetensors file is there"
    return (
        f"{folder}: expected {stem}.safetensors or {stem}.safetensors.index.json, but {found}; "
        "use a repository in Hugging Face's layout."
    )


def _damaged(file: Path, error: Exception) -> str:
    tensor = _first_cut_tensor(file)
    if tensor is None:
        return f"{file}: not a whole safetensors file ({error}); download or copy it again."
    return (
        f"{file}: truncated, {tensor} goes beyond the end of the file ({file.stat().st_size} "
        "bytes); download or copy it again."
    )


def _extents(file: Path) -> dict[str, tuple[int, int]]:
    """Where in the file each tensor starts and stops, by the header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length)) if length <= file.stat().st_size else {}
    first = 8 + length
    return {
        name: (first + entry["data_offsets"][0], first + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _first_cut_tensor(file: Path) -> str | None:
    """The first tensor whose bytes the file no longer holds, if its header can be read."""
    try:
        ends = {name: stop for name, (_, stop) in _extents(file).items()}
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size]
    return cut[0] if cut else None
