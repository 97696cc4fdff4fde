import jax
import numpy as np
import pytest

from jaxlora.core.tree import flatten
from jaxlora.lora import (
    LoraConfig,
    apply,
    count,
    init,
    match,
    merge,
    unmerge,
    with_biases,
)

LAYERS, IN, OUT = 3, 6, 4
NAMES = [f"layers.{layer}.q" for layer in range(LAYERS)]
NORMS = [f"layers.{layer}.norm" for layer in range(LAYERS)]
BIASES = {"q/bias": NAMES, "norm/bias": NORMS}
STACKED = ["q/kernel", "q/bias", "norm/bias"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {
    "q": {"kernel": normal(LAYERS, IN, OUT), "bias": normal(LAYERS, OUT, seed=1)},
    "norm": {"bias": normal(LAYERS, IN, seed=2)},
}


def targets_of(which, **fields):
    config = LoraConfig(r=2, train_bias=which, **fields)
    targets = match({"q/kernel": NAMES}, config, STACKED)
    return with_biases(targets, BIASES, which, STACKED)


@pytest.mark.parametrize(
    ("which", "trained"),
    [("none", set()), ("lora_only", {"q/bias"}), ("all", {"q/bias", "norm/bias"})],
)
def test_biases_that_train_are_those_peft_trains(which, trained):
    targets = targets_of(which)
    assert targets.keys() == trained | {"q/kernel"}
    adapter = init(PARAMS, targets, jax.random.key(0))
    sizes = {"q/bias": LAYERS * OUT, "norm/bias": LAYERS * IN}
    wanted = LAYERS * 2 * (IN + OUT) + sum(sizes[path] for path in trained)
    assert count(targets, adapter) == wanted


def test_a_fresh_adapter_changes_no_bias_and_is_a_copy():
    targets = targets_of("all")
    adapter = init(PARAMS, targets, jax.random.key(0))
    applied = flatten(apply(PARAMS, adapter, targets))
    for path in ("q/bias", "norm/bias"):
        np.testing.assert_array_equal(applied[path], flatten(PARAMS)[path])


def test_layers_left_out_keep_their_bias():
    targets = targets_of("lora_only", layers_to_transform=(1,))
    assert targets["q/bias"].ranks == (0, 1, 0)
    adapter = init(PARAMS, targets, jax.random.key(0))
    adapter["q/bias"] = {"value": normal(LAYERS, OUT, seed=5)}
    bias = apply(PARAMS, adapter, targets)["q"]["bias"]
    np.testing.assert_array_equal(bias[1], adapter["q/bias"]["value"][1])
    np.testing.assert_array_equal(bias[0], PARAMS["q"]["bias"][0])
    gradient = jax.grad(lambda pair: apply(PARAMS, pair, targets)["q"]["bias"].sum())(adapter)
    assert gradient["q/bias"]["value"].any(axis=-1).tolist() == [False, True, False]
    np.testing.assert_array_equal(merge(PARAMS, adapter, targets)["q"]["bias"], bias)


def test_a_bias_of_b_is_added_to_the_trained_bias():
    targets = targets_of("lora_only", lora_bias=True, alpha=3.0)
    adapter = init(PARAMS, targets, jax.random.key(0))
    adapter["q/bias"] = {"value": normal(LAYERS, OUT, seed=5)}
    adapter["q/kernel"]["bias"] = normal(LAYERS, OUT, seed=6)
    bias = apply(PARAMS, adapter, targets)["q"]["bias"]
    np.testing.assert_allclose(
        bias, adapter["q/bias"]["value"] + 1.5 * adapter["q/kernel"]["bias"], rtol=1e-6
    )


def test_trained_biases_cannot_be_unmerged():
    targets = targets_of("all")
    adapter = init(PARAMS, targets, jax.random.key(0))
    with pytest.raises(ValueError, match="biases cannot be unmerged"):
        unmerge(merge(PARAMS, adapter, targets), adapter, targets)
