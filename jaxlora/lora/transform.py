"""`init`, `apply`, `merge`, `unmerge`, `count`: pure functions between trees and adapters.

An adapter is ``{leaf path: {"a": [.., in, R], "b": [.., R, out]}}``, plus ``"magnitude"`` for
DoRA and ``"bias"`` for a bias of B; ``{bias path: {"value": ..}}`` where biases of the base train.
All are float32. The weights it belongs to stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, flatten, replace
from jaxlora.lora.biases import trained_biases
from jaxlora.lora.initializers import random_pair, table_pair
from jaxlora.lora.targets import Target
from jaxlora.ops.arrays import LoraArray
from jaxlora.ops.matmul import materialize

Adapter = dict[str, dict[str, jax.Array]]


def init(
    params: Mapping[str, Any],
    targets: Mapping[str, Target],
    key: jax.Array,
    init: bool | str = True,
) -> Adapter:
    """Returns a fresh adapter; as PEFT's default, A is random and B zero: no change yet.

    Args:
      params: weights, or arrays of the same shapes; read only for DoRA's magnitudes.
      targets: from `jaxlora.lora.match`.
      key: typed PRNG key.
      init: `LoraConfig.init`, one that leaves the base alone; for the others see
        `jaxlora.lora.splitting`.
    """
    leaves = flatten(params)
    keys = jax.random.split(key, len(targets))
    adapter = {}
    for (path, target), leaf_key in zip(sorted(targets.items()), keys, strict=True):
        if target.vector:  # a copy: what trains is donated, the base is not
            adapter[path] = {"value": jnp.array(leaves[path], jnp.float32, copy=True)}
            continue
        lead, in_dim, out_dim = matrix_shape(leaves[path], target)
        if target.embedding:
            a, b = table_pair(init, leaf_key, in_dim, out_dim, target.rank)
        else:
            a, b = random_pair(init, leaf_key, in_dim, out_dim, target.ranks, lead)
        adapter[path] = {"a": a, "b": b}
        if target.bias:
            adapter[path]["bias"] = jnp.zeros((*lead, out_dim), jnp.float32)
    return with_magnitudes(params, adapter, targets)


def with_magnitudes(
    params: Mapping[str, Any], adapter: Adapter, targets: Mapping[str, Target]
) -> Adapter:
    """Returns `adapter` with the magnitudes of its DoRA targets: column norms of the sum."""
    leaves = flatten(params)
    full = {}
    for path, pair in adapter.items():
        full[path] = pair
        if targets[path].dora:
            merged = materialize(_as_matrices(leaves[path], pair, targets[path]), jnp.float32)
            full[path] = {**pair, "magnitude": jnp.linalg.norm(merged, axis=-2)}
    return full


def matrix_shape(leaf: Any, target: Target) -> tuple[tuple[int, ...], int, int]:
    """Returns leading axes, inputs and outputs of the matrices of an adapted leaf."""
    lead = leaf.shape[: target.stacked + bool(target.experts)]
    dims = leaf.shape[len(lead) :]
    return lead, int(np.prod(dims[: target.in_axes])), int(np.prod(dims[target.in_axes :]))


def apply(
    params: Mapping[str, Any],
    adapter: Mapping[str, Mapping[str, jax.Array]],
    targets: Mapping[str, Target],
    key: UInt32[Array, "2"] | jax.Array | None = None,
    gathered: Mapping[str, Any] | None = None,
) -> Tree:
    """Returns `params` with a `LoraArray` wherever the adapter has a pair.

    A bias of B is added to the bias of its layer, if that has one.

    Args:
      params: frozen weights, plain or quantized.
      adapter: from `init`, or loaded.
      targets: the targets the adapter was made for.
      key: typed PRNG key of this step's dropout; None switches dropout off.
      gathered: `LoraArray.gathered` of the pairs that have one.
    """
    leaves = flatten(params)
    keys = {} if key is None else _dropout_keys(targets, key)
    biases = _biases(leaves, adapter, targets)
    return replace(
        params,
        biases
        | {
            path: LoraArray(
                base=leaves[path],
                a=pair["a"],
                b=pair["b"],
                scale=_scale(targets[path]),
                magnitude=pair.get("magnitude"),
                key=keys.get(path),
                dropout=targets[path].dropout,
                bias=None if _sibling(path) in biases else pair.get("bias"),
                gathered=(gathered or {}).get(path),
            )
            for path, pair in adapter.items()
            if not targets[path].vector
        },
    )


def _scale(target: Target) -> jax.Array:
    scale = jnp.asarray(target.scales if target.stacked else target.scales[0], jnp.float32)
    if not target.experts:
        return scale
    return jnp.broadcast_to(scale[..., None], (*scale.shape, target.experts))


def _sibling(path: str) -> str:
    """Path of the bias of the layer that a matrix belongs to."""
    return f"{path.rpartition('/')[0]}/bias"


def _biases(
    leaves: Mapping[str, Any],
    adapter: Mapping[str, Mapping[str, jax.Array]],
    targets: Mapping[str, Target],
) -> dict[str, jax.Array]:
    """Biases as trained, and with the biases of their layers' B added, in float32."""
    trained = trained_biases(leaves, adapter, targets)
    leaves = {**leaves, **trained}
    return trained | {
        sibling: leaves[sibling] + _scale(targets[path])[..., None] * pair["bias"]
        for path, pair in adapter.items()
        if "bias" in pair and (sibling := _sibling(path)) in leaves
    }


def _dropout_keys(targets: Mapping[str, Target], key: jax.Array) -> dict[str, jax.Array]:
    """Raw keys, one per layer, so that `jax.lax.scan` can slice them like any other leaf."""
    dropping = sorted(
        path for path, target in targets.items() if target.dropout > 0 and not target.vector
    )
    keys = {}
    for number, path in enumerate(dropping):
        leaf_key = jax.random.fold_in(key, number)
        if targets[path].stacked:
            leaf_key = jax.random.split(leaf_key, len(targets[path].modules))
        keys[path] = jax.random.key_data(leaf_key)
    return keys


def merge(
    params: Mapping[str, Any],
    adapter: Mapping[str, Mapping[str, jax.Array]],
    targets: Mapping[str, Target],
) -> Tree:
    """Returns `params` with the adapter folded in: ``W + scale * A B`` in float32, then W's dtype.

    Quantized leaves that have an adapter come out dequantized; leaves without stay as they are.

    Raises:
      UserError: a bias of B belongs to a layer without one.
    """
    leaves = flatten(params)
    biases = _biases(leaves, adapter, targets)
    for path, pair in adapter.items():
        if "bias" in pair and _sibling(path) not in biases:
            raise UserError(f"lora_bias: {path} has no bias of its own that could take it up.")
    return replace(
        params,
        {path: bias.astype(leaves[path].dtype) for path, bias in biases.items()}
        | {
            path: materialize(
                _as_matrices(leaves[path], pair, targets[path]), leaves[path].dtype
            ).reshape(leaves[path].shape)
            for path, pair in adapter.items()
            if not targets[path].vector
        },
    )


def unmerge(
    params: Mapping[str, Any],
    adapter: Mapping[str, Mapping[str, jax.Array]],
    targets: Mapping[str, Target],
) -> Tree:
    """Returns the weights before `merge`, to rounding: subtracts the low-rank product again.

    Raises:
      ValueError: DoRA rescales columns, which a merged weight no longer tells apart; a trained
        bias replaces that of the base.
    """
    if any("magnitude" in pair for pair in adapter.values()):
        raise ValueError("a DoRA adapter cannot be unmerged; keep the base weights")
    if any(target.vector for target in targets.values()):
        raise ValueError("trained biases cannot be unmerged; keep the base weights")
    negated = {
        path: {part: x if part == "a" else -x for part, x in pair.items()}
        for path, pair in adapter.items()
    }
    return merge(params, negated, targets)


def _as_matrices(leaf: Any, pair: Mapping[str, jax.Array], target: Target) -> LoraArray:
    lead, in_dim, out_dim = matrix_shape(leaf, target)
    base = leaf if leaf.ndim == len(lead) + 2 else leaf.reshape(*lead, in_dim, out_dim)
    return LoraArray(base, pair["a"], pair["b"], _scale(target), pair.get("magnitude"))


def count(targets: Mapping[str, Target], adapter: Mapping[str, Mapping[str, Any]]) -> int:
    """Returns how many adapter parameters train, not counting the padding of mixed ranks."""
    total = 0
    for path, pair in adapter.items():
        if targets[path].vector:
            total += sum(targets[path].ranks) * pair["value"].shape[-1]
            continue
        in_dim, out_dim = pair["a"].shape[-2], pair["b"].shape[-1]
        vectors = out_dim * len(pair.keys() - {"a", "b"})
        for rank in targets[path].ranks:
            total += rank * (in_dim + out_dim) * max(targets[path].experts, 1)
            total += vectors if rank else 0
    return total
