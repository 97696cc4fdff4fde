"""Token ids and what to train on, for many examples in three flat arrays that can live on disk."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlora.core.errors import UserError

_NAMES = {"tokens": np.int32, "trained": np.uint8, "offsets": np.int64}
_LABELS = "labels.npy"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TokenTable:
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``.

    tokens: int32 [N], trained: uint8 [N] (1 where the token is a target), offsets: int64 [n + 1].
    The first token of an example is never a target, so ``trained`` counts exactly what is learned.
    labels: int32 [n, 2] for a classifier: the number of each example's label and where its second
    text starts; nothing is trained of its tokens then.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def label(self, index: int) -> tuple[int, int] | None:
        """The label of one example and where its second text starts; None without labels."""
        if self.labels is None:
            return None
        label, second = self.labels[index].tolist()
        return label, second

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """The tokens and the trained mask of one example."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[start:stop], self.trained[start:stop]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, [n]."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, examples: Iterable[tuple[Any, Any]]) -> "TokenTable":
        """A table in memory from ``(tokens, trained)`` pairs.

        >>> TokenTable.of([([1, 5, 2], [0, 1, 1])]).lengths
        array([3])
        """
        tokens, trained, lengths = [], [], [0]
        for ids, mask in examples:
            tokens.append(np.asarray(ids, np.int32))
            trained.append(np.asarray(mask, np.uint8))
            assert len(tokens[-1]) == len(trained[-1])
            lengths.append(len(tokens[-1]))
        empty = [np.zeros(0, np.int32)]
        return cls(
            np.concatenate(tokens or empty).astype(np.int32),
            np.concatenate(trained or empty).astype(np.uint8),
            np.cumsum(lengths, dtype=np.int64),
        )

    @classmethod
    def load(cls, folder: Path) -> "TokenTable":
        """Opens the table that `TableWriter` left in a folder, memory-mapped.

        Raises:
            ValueError: a file is damaged or the three do not belong together.
        """
        arrays: dict[str, Any] = {}
        for name, dtype in _NAMES.items():
            array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(f"{folder}: {name}.npy is {array.dtype}, {array.ndim}-d")
            arrays[name] = array
        if (folder / _LABELS).is_file():
            arrays["labels"] = np.load(folder / _LABELS, allow_pickle=False)
            if arrays["labels"].shape != (len(arrays["offsets"]) - 1, 2):
                raise ValueError(f"{folder}: {_LABELS} does not belong to the others")
        table = cls(**arrays)
        sizes = {len(table.tokens), len(table.trained), int(table.offsets[-1])}
        if len(sizes) != 1:
            raise ValueError(f"{folder}: the arrays have different lengths {sorted(sizes)}")
        return table


class TableWriter:
    """Writes a table example by example in memory that does not grow with the tokens.

    Used in a `with` block; the table can be loaded after its end.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.longest = 0
        self.trained_tokens = 0
        self._lengths = array("q")
        self._labels: list[tuple[int, int]] = []
        self._files = {name: (folder / f"{name}.npy").open("wb") for name in ("tokens", "trained")}
        for name, file in self._files.items():
            _write_header(file, _NAMES[name], 0)

    def add(
        self,
        tokens: NDArray[np.int32],
        trained: NDArray[np.uint8],
        label: tuple[int, int] | None = None,
    ) -> None:
        """Appends one example; tokens int32 [T], trained uint8 [T], label as `TokenTable.label`."""
        assert tokens.dtype == np.int32
        assert trained.dtype == np.uint8
        assert tokens.shape == trained.shape
        self._files["tokens"].write(tokens.tobytes())
        self._files["trained"].write(trained.tobytes())
        self._lengths.append(len(tokens))
        if label is not None:
            self._labels.append(label)
        self.longest = max(self.longest, len(tokens))
        self.trained_tokens += int(trained.sum())

    def __len__(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._finish()
        for file in self._files.values():
            file.close()

    def _finish(self) -> None:
        """Writes the final headers and the offsets."""
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        for name, file in self._files.items():
            # The header is padded by numpy to a length that does not depend on the count.
            file.seek(0)
            _write_header(file, _NAMES[name], int(offsets[-1]))
        np.save(self.folder / "offsets.npy", offsets, allow_pickle=False)
        if self._labels:
            np.save(self.folder / _LABELS, np.array(self._labels, np.int32), allow_pickle=False)


def count_trained(folder: Path) -> int:
    """How many tokens of a table are trained, read piece by piece: a map would keep its pages."""
    with (folder / "trained.npy").open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return sum(np.frombuffer(piece, np.uint8).sum(dtype=int) for piece in _pieces(file))


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(_CHUNK):
        yield piece


def tables_digest(folder: Path) -> str:
    """A digest (hex) of every table in a folder: the same for the same examples in their order."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.npy")):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)} ".encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]


def _write_header(file: Any, dtype: Any, length: int) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    )


def check_vocabulary(table: TokenTable, vocab_size: int) -> None:
    """Checks that every token id is a row of the embedding.

    Raises:
        UserError: an id is negative or not below `vocab_size` (JAX would clamp it in silence).
    """
    for start in range(0, len(table.tokens), _CHUNK):
        chunk = table.tokens[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"the data holds token id {low if low < 0 else high}, but the model's embedding "
                f"has {vocab_size} rows: use the tokenizer that belongs to the model, without "
                "added tokens."
            )


def spans(table: TokenTable, index: int, tokenizer: Any) -> list[tuple[str, bool]]:
    """One example as ``(text, trained)`` pieces in order; joined they are its decoded text."""
    tokens, trained = table[index]
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    pieces, before = [], ""
    for start, stop in pairwise(edges):
        # Decoding from the start keeps spaces that a tokenizer drops at the start of a text.
        text = decode(tokens[:stop], tokenizer)
        piece = (
            text[len(before) :]
            if text.startswith(before)
            else decode(tokens[start:stop], tokenizer)
        )
        pieces.append((piece, bool(trained[start])))
        before = text
    return pieces


def decode(tokens: NDArray[np.int32], tokenizer: Any) -> str:
    """Token ids to text, special tokens included, nothing cleaned up."""
    return tokenizer.decode(
        tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
