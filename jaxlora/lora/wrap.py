"""LoRA for a model that knows nothing of jaxlora: any function of a tree of weights."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlora.core.tree import flatten, replace
from jaxlora.lora.targets import Target
from jaxlora.lora.transform import merge
from jaxlora.ops.matmul import materialize


def wrap(apply_fn: Callable[..., Any], targets: Mapping[str, Target]) -> Callable[..., Any]:
    """Returns ``f(params, adapter, *args)`` that runs `apply_fn` with the adapter added.

    The model's own layers see ordinary arrays, so linen modules, NNX modules and plain functions
    all work; the price is that each adapted weight is formed once per call, and again in the
    backward pass rather than kept. Frozen weights may be quantized. Gradients reach the adapter.
    `LoraConfig.dropout` has no effect: it drops inputs of a layer, which a wrapped model keeps to
    itself.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, params a nested dict.
      targets: from `jaxlora.lora.targets_of_tree`.

    >>> import jax.numpy as jnp
    >>> from jaxlora.lora import LoraConfig, init, targets_of_tree
    >>> params = {"dense": {"kernel": jnp.eye(3)}}
    >>> targets = targets_of_tree(params, LoraConfig(r=2, target_modules=("dense",)))
    >>> f = wrap(lambda params, x: x @ params["dense"]["kernel"], targets)
    >>> f(params, init(params, targets, jax.random.key(0)), jnp.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    """

    def wrapped(params, adapter, *args, **kwargs):
        @jax.checkpoint
        def run(adapter):
            merged = merge(jax.lax.stop_gradient(params), adapter, targets)
            plain = {path: materialize(leaf) for path, leaf in flatten(merged).items()}
            return apply_fn(replace(merged, plain), *args, **kwargs)

        return run(adapter)

    return wrapped
