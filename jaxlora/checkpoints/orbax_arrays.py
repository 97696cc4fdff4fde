"""Named arrays in orbax's format; what they are is for the manifest to say."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.alone import alone


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays that nobody changes meanwhile into a new folder; none makes no folder."""
    from orbax.checkpoint import v1 as ocp

    # Orbax refuses arrays of size zero and trees without a leaf; the manifest says all about them.
    stored = {name: array for name, array in arrays.items() if array.size}
    if not stored:
        return
    context = ocp.Context()
    # Trained float32 hardly compresses: 10 % smaller files for twice the time (100 MB measured).
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False  # `_to_host` has made our copy
    with alone(context), _errors_told_once():
        ocp.save(str(path), stored)


def load_arrays(path: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of `target`, placed as its leaves are (see `CheckpointStore.restore`)."""
    from orbax.checkpoint import v1 as ocp

    abstract: dict[str, Any] = {}
    for name, leaf in target.items():
        if 0 in leaf.shape:
            continue
        if _placed(leaf):
            abstract[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        else:  # tells orbax "numpy" and takes no memory
            abstract[name] = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    with alone(ocp.Context()):
        loaded = dict(ocp.load(str(path), abstract)) if abstract else {}
    restored: dict[str, Any] = {}
    for name, leaf in target.items():
        array = loaded[name] if name in loaded else np.zeros(leaf.shape, leaf.dtype)
        if _placed(leaf):
            restored[name] = array if name in loaded else jax.device_put(array, leaf.sharding)
        else:
            host = isinstance(leaf, np.ndarray | np.generic)
            restored[name] = array if host else jnp.asarray(array)
    return restored


@contextlib.contextmanager
def _errors_told_once() -> Iterator[None]:
    """Orbax logs, with pages of traceback, what it then raises.

    The writes beside one that failed find its event loop closed when they end, which may be later
    than here, and Python would print a traceback of each.
    """
    usual = sys.unraisablehook

    def unless_late(problem: Any) -> None:
        if str(problem.exc_value) != "Event loop is closed":
            usual(problem)

    def is_news(record: logging.LogRecord) -> bool:
        return "raised an exception" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    sys.unraisablehook = unless_late
    try:
        yield
        sys.unraisablehook = usual
    finally:
        logger.removeFilter(is_news)


def _placed(leaf: Any) -> bool:
    """Whether the target says on which devices the leaf must lie."""
    if isinstance(leaf, jax.Array):
        return leaf.committed
    return getattr(leaf, "sharding", None) is not None
