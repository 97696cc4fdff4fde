"""Weights laid out for decoding: where a token is one pass over all of them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe
from jaxlora.models.stacks import Apart
from jaxlora.ops.arrays import LoraArray
from jaxlora.ops.matmul import materialize


def for_decoding(params: Mapping[str, Any], cfg: ModelConfig) -> Tree:
    """Returns the weights of a model as one CPU decodes them fastest; elsewhere as they are.

    Low-rank pairs on a plain float32 base are added to it once instead of for every token, and the
    layers of a stack are put `Apart`, without a copy.

    Args:
      params: any leaves that `bind` accepts.
      cfg: of the model.
    """
    leaves, specs = flatten(params), describe(cfg)
    if not _on_one_cpu(leaves):
        return unflatten(leaves)
    return unflatten(
        {
            path: _laid_out(leaf, stacked=specs[path].layers is not None)
            for path, leaf in leaves.items()
        }
    )


def _on_one_cpu(leaves: Any) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(leaves) if isinstance(leaf, jax.Array)]
    devices = {device for array in arrays for device in array.devices()}
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def _laid_out(leaf: Any, *, stacked: bool) -> Any:
    if isinstance(leaf, LoraArray) and leaf.bias is None and _is_float32(leaf.base):
        leaf = _merged(leaf)
    return jax.tree.map(_apart, leaf) if stacked else leaf


def _is_float32(base: Any) -> bool:
    return isinstance(base, jax.Array) and base.dtype == jnp.float32


_merged = jax.jit(materialize)


def _apart(stack: Any) -> Any:
    if stack.dtype == jnp.int4:  # is another thing to numpy, and would be copied
        return stack
    # Views of one buffer: an array of a CPU takes over host memory that is aligned.
    return Apart(tuple(jax.device_put(layer, may_alias=True) for layer in np.asarray(stack)))
