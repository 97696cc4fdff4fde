"""Biases of the base that train themselves: PEFT's ``bias: lora_only`` and ``bias: all``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.lora.targets import Target


def with_biases(
    targets: Mapping[str, Target],
    biases: Mapping[str, Sequence[str]],
    which: str,
    stacked: Iterable[str] = (),
) -> dict[str, Target]:
    """Returns `targets` and those of the biases that train.

    Args:
      targets: of low-rank pairs, from `jaxlora.lora.match`.
      biases: ``{leaf path: module path of each layer}`` of every bias.
      which: ``"none"``, ``"lora_only"`` (of layers with a pair) or ``"all"``.
      stacked: leaf paths with a leading layer axis.

    >>> pair = Target(("h.0.q", "h.1.q"), (4, 0), (2.0, 0.0), stacked=True)
    >>> with_biases({"q/kernel": pair}, {"q/bias": ["h.0.q", "h.1.q"]}, "lora_only")["q/bias"].ranks
    (1, 0)
    """
    wrapped = {
        module
        for target in targets.values()
        for module, rank in zip(target.modules, target.ranks, strict=True)
        if rank
    }
    stacked, found = set(stacked), {}
    for path, modules in biases.items():
        trained = [which == "all" or (which == "lora_only" and m in wrapped) for m in modules]
        if any(trained):
            found[path] = Target(
                tuple(modules),
                tuple(int(trains) for trains in trained),
                tuple(float(trains) for trains in trained),
                path in stacked,
                vector=True,
                wrapped=tuple(module in wrapped for module in modules),
            )
    return {**targets, **found}


def trained_biases(
    leaves: Mapping[str, Any],
    adapter: Mapping[str, Mapping[str, jax.Array]],
    targets: Mapping[str, Target],
) -> dict[str, jax.Array]:
    """Returns ``{leaf path: bias}`` in float32, the base's own where a layer is left out."""
    biases = {}
    for path, pair in adapter.items():
        if targets[path].vector:
            trains = np.array(targets[path].ranks, bool)[:, None]
            value = pair["value"]
            biases[path] = jnp.where(trains, value, leaves[path]) if value.ndim == 2 else value
    return biases
