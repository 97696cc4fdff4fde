"""What decays, and where the optimizer's state lives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.config.derived import OPTIMIZERS
from jaxlora.config.load import load_config
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.training.state import init_optimizer, make_tx

CFG = ModelConfig(
    vocab_size=8,
    embed_dim=4,
    mlp_dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_context=8,
    norm_eps=1e-5,
    rope_theta=1e4,
    qkv_bias=True,
    output_bias=True,
)
SPECS = describe(CFG)


def full(keys, **changes):
    adapter = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_linear"))
    values = {**keys, **adapter, "warmup_steps": 0, "weight_decay": 0.1, **changes}
    config = load_config({key: value for key, value in values.items() if value is not None})
    placement = Placement(make_mesh(None, jax.devices()[:1]))
    leaves = {
        path: placement.weight(
            jnp.ones(spec.full_shape), spec.axes, stacked=spec.layers is not None
        )
        for path, spec in SPECS.items()
    }
    trainable = {"params": leaves, "adapter": {}}
    return make_tx(config, trainable, SPECS, 10)[0], trainable, placement


def test_norms_and_biases_do_not_decay(keys):
    optimizer, trainable, _ = full(keys)
    zero = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = optimizer.update(zero, optimizer.init(trainable), trainable)
    still = {path for path, update in updates["params"].items() if not np.any(update)}
    assert still == {path for path, spec in SPECS.items() if spec.kind in ("norm", "bias")}
    assert any(spec.kind == "bias" for spec in SPECS.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_state_is_that_of_optax_and_placed(keys, name):
    optimizer, trainable, placement = full(keys, optimizer=name)
    state = init_optimizer(optimizer, trainable, placement)
    wanted = optimizer.init(trainable)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert all(leaf.sharding.mesh == placement.mesh for leaf in jax.tree.leaves(state))
