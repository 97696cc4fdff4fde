"""What PEFT calls the tensors of an adapter, and how it lays them out."""

from collections.abc import Iterator, Mapping

import numpy as np

from jaxlora.lora.targets import Target

PREFIX = "base_model.model."
_SUFFIXES = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
    "bias": ".lora_B.bias",
}
_TABLE_SUFFIXES = _SUFFIXES | {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}


def entries(targets: Mapping[str, Target]) -> Iterator[tuple[str, str, int, str]]:
    """Yields ``(leaf path, part of the adapter, layer, PEFT's key)`` of every tensor."""
    for path, target in sorted(targets.items()):
        if target.vector:
            for layer, (module, trains) in enumerate(
                zip(target.modules, target.ranks, strict=True)
            ):
                suffix = ".base_layer.bias" if target.wrapped[layer] else ".bias"
                if trains:
                    yield path, "value", layer, f"{PREFIX}{module}{suffix}"
            continue
        present = {"a": True, "b": True, "magnitude": target.dora, "bias": target.bias}
        suffixes = _TABLE_SUFFIXES if target.embedding else _SUFFIXES
        for layer, rank in enumerate(target.ranks):
            for part, suffix in suffixes.items():
                if rank and present[part]:
                    yield path, part, layer, f"{PREFIX}{_wrapped(target, layer)}{suffix}"


def _wrapped(target: Target, layer: int) -> str:
    """What PEFT calls the module with the adapter: for a parameter, the one that holds it, wrapped
    once for each of its parameters."""
    if not target.nested:
        return target.modules[layer]
    holder = target.modules[layer].rpartition(".")[0]
    return holder + ".base_layer" * target.nested[layer]


def to_peft(leaf: np.ndarray, target: Target, layer: int, part: str) -> np.ndarray:
    """Returns one of PEFT's tensors: a layer's A as ``[R, in]``, B as ``[out, R]``.

    Experts' are ``[E * R, in]``, one after the other, and ``[out, R * E]``, alternating.
    """
    values = leaf[layer] if target.stacked else leaf
    rank = target.ranks[layer]
    if part == "a":  # expert by expert
        values = np.swapaxes(values[..., :rank], -1, -2).reshape(-1, values.shape[-2])
    elif part == "b":  # rank by rank, and within it expert by expert
        values = np.moveaxis(values[..., :rank, :], -1, 0)
        values = np.swapaxes(values, 1, -1).reshape(len(values), -1)
    return np.ascontiguousarray(values, np.float32)


def put(where: np.ndarray, values: np.ndarray, part: str, rank: int) -> None:
    """Writes one of PEFT's tensors into a layer's array; the reverse of `_peft_tensor`."""
    if part == "a":
        *lead, in_dim, _ = where.shape
        where[..., :rank] = np.swapaxes(values.reshape(*lead, rank, in_dim), -1, -2)
    elif part == "b":
        *lead, _, out_dim = where.shape
        values = np.swapaxes(values.reshape(out_dim, rank, *lead), 1, -1)
        where[..., :rank, :] = np.moveaxis(values, 0, -1)
    else:
        where[:] = values
