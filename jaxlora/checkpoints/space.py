"""Whether a run's files will fit on the disk, before the first of them is written."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError

# Measured with orbax 0.12.8 on 12 to 1200 leaves of 4 KiB to 1 MiB (benchmarks/reliability): our
# manifest and orbax's metadata together. Leaves below 1 KiB take more, and matter less.
_PER_CHECKPOINT, _PER_LEAF = 9000, 340


def checkpoint_bytes(leaves: Mapping[str, Any]) -> int:
    """Returns what a checkpoint of such arrays (anything with shape and dtype) will take."""
    arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    return arrays + _PER_LEAF * len(leaves) + _PER_CHECKPOINT


def check_space(folder: Path, parts: Mapping[str, int]) -> None:
    """Checks that the disk of a folder has room for all parts.

    Args:
      folder: where they will be written; need not exist. What it holds already counts as written.
      parts: bytes by what they are.

    Raises:
      UserError: says how much is needed, for what, and how much is free.
    """
    existing = folder
    while not existing.is_dir():
        existing = existing.parent
    needed, free = sum(parts.values()), shutil.disk_usage(existing).free
    written = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if needed > free + written:
        listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
        raise UserError(
            f"output_dir {folder}: needs {_size(needed)} ({listed}), and {_size(free)} are free; "
            "free space, lower save_total_limit or choose another output_dir."
        )


def _size(size: int) -> str:
    """Bytes for people.

    >>> _size(5 * 2**20)
    '5.0 MiB'
    """
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
