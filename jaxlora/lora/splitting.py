"""Adapters that are split off the base weights, matrix by matrix as these are read."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, flatten, replace
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.initializers import Store, split
from jaxlora.lora.targets import Target
from jaxlora.lora.transform import Adapter, matrix_shape
from jaxlora.ops.matmul import materialize


class Splitter:
    """Takes A and B out of each matrix it is shown and gives back what the base keeps.

    Args:
      targets: from `jaxlora.lora.match`.
      config: the options they were made from; its `init` must be one that changes the base.
      key: typed PRNG key; each matrix has its own, whatever the order they come in.
    """

    def __init__(self, targets: Mapping[str, Target], config: LoraConfig, key: jax.Array):
        self.targets, self.config, self.key = targets, config, key
        self.numbers = {path: number for number, path in enumerate(sorted(targets))}
        self.pairs: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, path: str, layer: int, matrix: np.ndarray, store: Store) -> Any:
        """Returns the leaf of the base for one layer's matrix ``[in, out]``.

        Args:
          path: leaf path.
          layer: row in the stacked leaf, 0 if it stands alone.
          matrix: the weight as loaded.
          store: makes the leaf of a matrix.
        """
        target = self.targets.get(path)
        if target is None or not target.ranks[layer]:
            return store(matrix)
        key = jax.random.fold_in(jax.random.fold_in(self.key, self.numbers[path]), layer)
        leaf, pair = split(
            str(self.config.init),
            matrix,
            target.ranks[layer],
            target.scales[layer],
            store,
            key,
            loftq_iter=self.config.loftq_iter,
        )
        whole = self.pairs.setdefault(path, _zeros(target, *matrix.shape))
        at = layer if target.stacked else ...
        rank = pair[0].shape[1]
        whole["a"][at][:, :rank], whole["b"][at][:rank] = pair
        return leaf

    def adapter(self) -> Adapter:
        """Returns the pairs taken out, in float32 (see `with_magnitudes` for DoRA).

        Raises:
          UserError: a target was not among the matrices, which are those of linear layers.
        """
        for path in self.targets.keys() - self.pairs.keys():
            raise UserError(
                f"peft_init_lora_weights: {self.config.init} is for linear layers, which "
                f"{self.targets[path].modules[0]} is not; leave it out of the targets."
            )
        return {
            path: {part: jnp.asarray(x) for part, x in pair.items()}
            for path, pair in sorted(self.pairs.items())
        }


def _zeros(target: Target, in_dim: int, out_dim: int) -> dict[str, np.ndarray]:
    lead = (len(target.ranks),) if target.stacked else ()
    return {
        "a": np.zeros((*lead, in_dim, target.rank), np.float32),
        "b": np.zeros((*lead, target.rank, out_dim), np.float32),
    }


def split_tree(
    params: Mapping[str, Any], targets: Mapping[str, Target], config: LoraConfig, key: jax.Array
) -> tuple[Tree, Adapter]:
    """Returns `params` less an adapter, and the adapter: together they are `params` again.

    For trees in memory and PiSSA or OLoRA; quantize what comes back, if at all, afterwards.

    Args:
      params: plain weights.
      targets: from `jaxlora.lora.match` or `targets_of_tree`.
      config: the options they were made from.
      key: typed PRNG key.

    >>> from jaxlora.lora import apply, targets_of_tree
    >>> params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}}
    >>> config = LoraConfig(r=1, alpha=1, target_modules=("dense",), init="pissa")
    >>> targets = targets_of_tree(params, config)
    >>> base, adapter = split_tree(params, targets, config, jax.random.key(0))
    >>> base["dense"]["kernel"].round(5).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    if config.init == "loftq":
        raise ValueError("LoftQ needs the format the base is stored in; use a Splitter")
    splitter = Splitter(targets, config, key)
    leaves = flatten(params)
    kept = {}
    for path, target in targets.items():
        leaf = leaves[path]
        _, in_dim, out_dim = matrix_shape(leaf, target)
        matrices = np.asarray(materialize(leaf, jnp.float32)).reshape(-1, in_dim, out_dim)
        parts = [splitter(path, layer, m, lambda x: x) for layer, m in enumerate(matrices)]
        kept[path] = jnp.asarray(np.stack(parts).reshape(leaf.shape), leaf.dtype)
    return replace(params, kept), splitter.adapter()


def as_difference(
    adapter: Mapping[str, Mapping[str, Any]],
    initial: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, Target],
    config: LoraConfig,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Target], LoraConfig]:
    """Returns ``scale * (A B - A0 B0)`` as an adapter of twice the rank, for the untouched base.

    What PEFT's ``path_initial_model_for_weight_conversion`` does: ``[A | A0] [B ; -B0]`` with r and
    alpha doubled (times sqrt 2 with rsLoRA), so that the scale stays.

    Args:
      adapter: as trained; a DoRA magnitude stays as it is.
      initial: what was split off the base.
      targets: of both.
      config: of both.

    Returns:
      ``(adapter, targets, config)`` of the difference.
    """
    longer = 2**0.5 if config.use_rslora else 2
    doubled = config.doubled(longer)
    arrays, new_targets = {}, {}
    for path, target in targets.items():
        new = target.doubled(
            [
                doubled.scale(2 * rank, longer * config.alpha_of(scale, rank)) if rank else 0.0
                for rank, scale in zip(target.ranks, target.scales, strict=True)
            ]
        )
        new_targets[path] = new
        pair = {part: np.asarray(x) for part, x in adapter[path].items()}
        in_dim, out_dim = pair["a"].shape[-2], pair["b"].shape[-1]
        both = _zeros(new, in_dim, out_dim)
        for layer, rank in enumerate(target.ranks):
            at = layer if target.stacked else ...
            for start, part, sign in ((0, pair, 1), (rank, initial[path], -1)):
                both["a"][at][:, start : start + rank] = np.asarray(part["a"])[at][:, :rank]
                both["b"][at][start : start + rank] = sign * np.asarray(part["b"])[at][:rank]
        arrays[path] = {**pair, **both}
    return arrays, new_targets, doubled
