"""Rows that are held out of training for evaluation."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxlora.core.errors import UserError
from jaxlora.data.spec import DataOptions
from jaxlora.data.table import TableWriter, TokenTable


def hold_out(out: Path, row_of: NDArray[np.int64], options: DataOptions) -> NDArray[np.bool_]:
    """Moves `val_set_size` of the rows (whole rows, so no text is in both) to the evaluation.

    Args:
        out: the folder of the table ``train``; ``evaluation`` is written beside it.
        row_of: the row of each example, [n].
        options: how many, and the seed.

    Returns:
        Which examples stay, [n].
    """
    found, size = np.unique(row_of), options.val_set_size
    count = int(size) if size >= 1 else math.ceil(len(found) * size)
    if count >= len(found):
        raise UserError(
            f"val_set_size: {count} rows would be held out of {len(found)}; nothing would be left "
            "to train on."
        )
    chosen = np.random.default_rng(options.seed).permutation(found)[:count]
    held = np.isin(row_of, chosen)
    everything = TokenTable.load(out / "train")
    for name, mask in (("split", ~held), ("evaluation", held)):
        with TableWriter(out / name) as writer:
            for index in np.flatnonzero(mask).tolist():
                writer.add(*everything[index], everything.label(index))
    del everything
    for file in (out / "train").iterdir():
        file.unlink()
    (out / "train").rmdir()
    (out / "split").rename(out / "train")
    return ~held
