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


def test_lora_plus_speeds_up_b_and_every_vector(keys):
    """The groups of PEFT's `create_loraplus_optimizer`."""
    rates = {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-4, "learning_rate": 1e-2}
    plain = {"optimizer": "sgd", "max_grad_norm": 0, "warmup_steps": 0, "lr_scheduler": "constant"}
    config = load_config({**keys, **plain, **rates})
    pair = {part: jnp.ones((2, 2)) for part in ("a", "b", "magnitude", "bias")}
    bias = next(path for path, spec in SPECS.items() if spec.kind == "bias")
    kernel = f"{bias.rpartition('/')[0]}/kernel"
    trainable = {
        "params": {},
        "adapter": {kernel: pair, "embed/embedding": pair, bias: {"value": jnp.ones(2)}},
    }
    optimizer, _ = make_tx(config, trainable, SPECS, 10)
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
    moved = {
        path: {part: float(-update.ravel()[0]) for part, update in entry.items()}
        for path, entry in updates["adapter"].items()
    }
    fast = pytest.approx(0.16)
    assert moved[kernel] == {"a": pytest.approx(0.01), "b": fast, "magnitude": fast, "bias": fast}
    assert moved["embed/embedding"] == dict.fromkeys(pair, pytest.approx(1e-4))
    assert moved[bias] == {"value": fast}
