import jax
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.lora import (
    LoraConfig,
    Splitter,
    apply,
    as_difference,
    match,
    merge,
    split_tree,
    with_magnitudes,
)
from jaxlora.ops.matmul import materialize

LAYERS, IN, OUT = 3, 10, 6
MODULES = {"layers/q/kernel": [f"layers.{layer}.q" for layer in range(LAYERS)], "head": ["head"]}
KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {"layers": {"q": {"kernel": normal(LAYERS, IN, OUT)}}, "head": normal(IN, OUT, seed=1)}
CONFIGS = {
    "pissa": LoraConfig(r=3, alpha=2, init="pissa"),
    "olora": LoraConfig(r=3, alpha=2, init="olora"),
    "rslora": LoraConfig(r=3, alpha=2, init="pissa", use_rslora=True),
    "patterns": LoraConfig(
        r=3, alpha=2, init="pissa_niter_2", rank_pattern={"1.q": 1}, alpha_pattern={"head": 5}
    ),
    "some layers": LoraConfig(r=3, init="olora", target_modules=("q",), layers_to_transform=(0, 2)),
    "dora": LoraConfig(r=3, alpha=2, init="pissa", use_dora=True),
}


def targets_of(config):
    return match(MODULES, config, stacked=["layers/q/kernel"])


def dense(params, adapter, targets):
    applied = flatten(apply(params, adapter, targets))
    return {path: np.asarray(materialize(leaf)) for path, leaf in applied.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_split_off_and_what_is_left_are_the_weights(name):
    config = CONFIGS[name]
    targets = targets_of(config)
    rest, adapter = split_tree(PARAMS, targets, config, KEY)
    assert adapter.keys() == targets.keys()
    whole = dense(rest, adapter, targets)
    for path, leaf in flatten(PARAMS).items():
        np.testing.assert_allclose(whole[path], leaf, atol=1e-5)  # float32 roundings


@pytest.mark.parametrize("name", CONFIGS)
def test_difference_on_the_whole_base_equals_the_adapter_on_the_rest(name):
    config = CONFIGS[name]
    targets = targets_of(config)
    rest, initial = split_tree(PARAMS, targets, config, KEY)
    adapter = with_magnitudes(rest, initial, targets)
    trained = {
        path: {part: x * (1 + 0.3 * normal(*x.shape, seed=2)) for part, x in pair.items()}
        for path, pair in adapter.items()
    }
    exported, doubled, options = as_difference(trained, initial, targets, config)
    assert options.r == 6
    assert options.init is True
    for path, target in doubled.items():
        assert target.ranks == tuple(2 * rank for rank in targets[path].ranks)
        np.testing.assert_allclose(target.scales, targets[path].scales, rtol=1e-15)
    ours, theirs = dense(rest, trained, targets), dense(PARAMS, exported, doubled)
    for path in targets:
        np.testing.assert_allclose(theirs[path], ours[path], atol=1e-5)
        assert np.abs(ours[path] - flatten(PARAMS)[path]).max() > 0.1


def test_a_matrix_is_split_alike_in_whatever_order_they_come():
    config = CONFIGS["patterns"]
    targets = targets_of(config)
    order = [("head", 0), *(("layers/q/kernel", layer) for layer in range(LAYERS))]
    results = []
    for visited in (order, order[::-1]):
        splitter = Splitter(targets, config, KEY)
        for path, layer in visited:
            leaf = flatten(PARAMS)[path]
            splitter(path, layer, leaf if path == "head" else leaf[layer], lambda x: x)
        results.append(jax.tree.leaves(splitter.adapter()))
    assert all(np.array_equal(*pair) for pair in zip(*results, strict=True))


def test_leaves_without_a_target_are_only_stored():
    config = CONFIGS["some layers"]
    splitter = Splitter(targets_of(config), config, KEY)
    matrix = normal(IN, OUT)
    assert splitter("head", 0, matrix, lambda x: x) is matrix
    assert splitter("layers/q/kernel", 1, matrix, lambda x: x) is matrix
    assert splitter.pairs == {}


def test_a_target_that_was_never_shown_is_an_error():
    config = CONFIGS["pissa"]
    splitter = Splitter(targets_of(config), config, KEY)
    splitter("head", 0, normal(IN, OUT), lambda x: x)
    with pytest.raises(UserError, match=r"pissa is for linear layers, which layers\.0\.q is not"):
        splitter.adapter()


def test_a_tree_in_memory_has_no_format_for_loftq():
    config = LoraConfig(r=2, init="loftq")
    with pytest.raises(ValueError, match="LoftQ needs the format"):
        split_tree(PARAMS, targets_of(config), config, KEY)


def test_merge_folds_what_was_split_off_back_in():
    config = CONFIGS["pissa"]
    targets = targets_of(config)
    merged = flatten(merge(*split_tree(PARAMS, targets, config, KEY), targets))
    for path, leaf in flatten(PARAMS).items():
        np.testing.assert_allclose(merged[path], leaf, atol=1e-5)
