import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig, apply, count, init, match_parameters, merge
from jaxlora.ops.matmul import materialize

LAYERS, EXPERTS = 3, 5
PARAMETERS = {
    "gate_up": [f"h.{layer}.mlp.experts.gate_up_proj" for layer in range(LAYERS)],
    "down": [f"h.{layer}.mlp.experts.down_proj" for layer in range(LAYERS)],
    "router": [f"h.{layer}.mlp.gate.weight" for layer in range(LAYERS)],
}
COUNTS = {"gate_up": EXPERTS, "down": EXPERTS}


def targets_of(*rules, **options):
    config = LoraConfig(r=4, alpha=8, target_parameters=rules, **options)
    return match_parameters(PARAMETERS, config, stacked=list(PARAMETERS), experts=COUNTS)


def test_the_weight_that_a_module_holds_first_lies_deepest():
    targets = targets_of("gate_up_proj", "experts.down_proj", "gate.weight")
    assert {path: target.nested for path, target in targets.items()} == {
        "gate_up": (1, 1, 1),
        "down": (0, 0, 0),
        "router": (0, 0, 0),
    }


def test_depth_follows_what_is_adapted_in_each_layer():
    targets = targets_of("gate_up_proj", "h.1.mlp.experts.down_proj")
    assert targets["gate_up"].nested == (0, 1, 0)
    assert targets["down"].ranks == (0, 4, 0)


def test_a_rule_that_matches_nothing_names_what_there_is():
    with pytest.raises(UserError, match=r"'down' matches no .*experts\.down_proj.*gate\.weight"):
        targets_of("down")


@pytest.mark.parametrize(
    "option",
    [
        {"dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"train_bias": "all"},
        {"init": "pissa"},
    ],
    ids=str,
)
def test_what_peft_does_not_do_on_experts_is_refused(option):
    with pytest.raises(UserError, match="does not go with lora_target_parameters"):
        targets_of("down_proj", **option)


def test_every_expert_has_a_pair_of_its_own():
    targets = targets_of("down_proj", rank_pattern={r"h\.0\..*": 2})
    params = {"down": jnp.zeros((LAYERS, EXPERTS, 6, 7))}
    adapter = init(params, targets, jax.random.key(0))
    a, b = adapter["down"]["a"], adapter["down"]["b"]
    assert (a.shape, b.shape) == ((LAYERS, EXPERTS, 6, 4), (LAYERS, EXPERTS, 4, 7))
    assert not np.any(a[0, ..., 2:])
    assert np.all(np.any(np.asarray(a[0, ..., :2]), axis=-2))
    assert len(np.unique(a[1, :, 0, 0])) == EXPERTS
    assert count(targets, adapter) == EXPERTS * (6 + 7) * (2 + 4 + 4)


def test_merged_experts_are_base_and_scaled_product():
    targets = targets_of("down_proj", alpha_pattern={r"h\.2\..*": 1.0})
    rng = np.random.default_rng(0)
    params = {"down": jnp.asarray(rng.standard_normal((LAYERS, EXPERTS, 6, 7)), jnp.float32)}
    adapter = init(params, targets, jax.random.key(0))
    b = jnp.asarray(rng.standard_normal((LAYERS, EXPERTS, 4, 7)), jnp.float32)
    adapter = {"down": {**adapter["down"], "b": b}}
    scales = np.array([2.0, 2.0, 0.25])[:, None, None, None]
    wanted = params["down"] + scales * (adapter["down"]["a"] @ b)
    merged = merge(params, adapter, targets)["down"]
    # One float32 rounding of values of size 1.
    np.testing.assert_allclose(merged, wanted, atol=2e-6)
    leaf = apply(params, adapter, targets)["down"]
    np.testing.assert_array_equal(materialize(leaf), merged)
