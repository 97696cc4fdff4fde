import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten, replace
from jaxlora.lora import LoraConfig, apply, count, init, match, merge, targets_of_tree, unmerge
from jaxlora.ops.matmul import materialize, matmul
from jaxlora.ops.quantize import FORMATS, dequantize, quantize

LAYERS, IN, OUT = 3, 10, 6
MODULES = {
    "layers/q/kernel": [f"layers.{layer}.q" for layer in range(LAYERS)],
    "layers/v/kernel": [f"layers.{layer}.v" for layer in range(LAYERS)],
}
PATHS = tuple(MODULES)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS = {
    "layers": {
        "q": {"kernel": normal(LAYERS, IN, OUT, seed=1)},
        "v": {"kernel": normal(LAYERS, IN, OUT, seed=2)},
    },
    "norm": {"scale": normal(IN, seed=3)},
}


def targets_of(**fields):
    return match(MODULES, LoraConfig(**{"r": 2, "alpha": 3.0, **fields}), stacked=MODULES)


def trained(params, targets, seed=7):
    """A fresh adapter with a B that is not zero where it may not be."""
    adapter = init(params, targets, jax.random.key(0))
    for number, (path, pair) in enumerate(sorted(adapter.items())):
        ranks = np.array(targets[path].ranks).reshape(-1, 1, 1)
        used = np.arange(targets[path].rank)[:, None] < ranks
        noise = normal(*pair["b"].shape, seed=seed + number)
        pair["b"] = noise * used.reshape((*noise.shape[:-1], 1))
    return adapter


def run(params, x):
    """Multiplies by every stacked leaf, layer by layer."""

    def layer(x, leaves):
        return jnp.tanh(matmul(x, leaves["q"]["kernel"]) @ normal(OUT, IN)) + x @ jnp.ones(
            (IN, IN)
        ) * 0.01 + matmul(x, leaves["v"]["kernel"]).sum(-1, keepdims=True), None

    return jax.lax.scan(layer, x, params["layers"])[0]


X = normal(4, IN, seed=5)
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "mixed ranks": {"rank_pattern": {r"layers\.1\.q": 5, r"layers\.2\.v": 1}},
    "some layers": {"target_modules": ("q",), "layers_to_transform": (0, 2)},
    "some layers, dora": {
        "target_modules": ("q", "v"),
        "layers_to_transform": (1,),
        "use_dora": True,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_changes_nothing(variant):
    targets = targets_of(**VARIANTS[variant])
    adapter = init(PARAMS, targets, jax.random.key(0))
    np.testing.assert_allclose(run(apply(PARAMS, adapter, targets), X), run(PARAMS, X), rtol=1e-5)
    assert {path for path, pair in adapter.items() if pair["a"].any()} == set(targets)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_adapter_equals_unmerged(variant):
    targets = targets_of(**VARIANTS[variant])
    adapter = trained(PARAMS, targets)
    wanted = run(apply(PARAMS, adapter, targets), X)
    # float32, three layers.
    np.testing.assert_allclose(run(merge(PARAMS, adapter, targets), X), wanted, rtol=2e-5)
    assert np.abs(wanted - run(PARAMS, X)).max() > 0.1


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "dora" not in name])
def test_unmerge_undoes_merge(variant):
    targets = targets_of(**VARIANTS[variant])
    adapter = trained(PARAMS, targets)
    back = unmerge(merge(PARAMS, adapter, targets), adapter, targets)
    for path, leaf in flatten(PARAMS).items():
        # One rounding of a sum of size 10 each way.
        np.testing.assert_allclose(flatten(back)[path], leaf, atol=2e-6)


def test_unmerging_dora_is_refused():
    targets = targets_of(use_dora=True)
    adapter = init(PARAMS, targets, jax.random.key(0))
    with pytest.raises(ValueError, match="DoRA"):
        unmerge(PARAMS, adapter, targets)


def test_merge_leaves_the_rest_alone():
    targets = targets_of(target_modules=("q",), layers_to_transform=(0, 2))
    merged = merge(PARAMS, trained(PARAMS, targets), targets)
    assert merged["norm"]["scale"] is PARAMS["norm"]["scale"]
    assert merged["layers"]["v"]["kernel"] is PARAMS["layers"]["v"]["kernel"]
    before, after = PARAMS["layers"]["q"]["kernel"], merged["layers"]["q"]["kernel"]
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(after[0] - before[0]).max() > 0.1


def test_merge_keeps_the_dtype_and_adds_in_float32():
    targets = targets_of()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    adapter = trained(params, targets)
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), params), adapter, targets)
    for path in PATHS:
        leaf = flatten(merge(params, adapter, targets))[path]
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, flatten(exact)[path].astype(jnp.bfloat16))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_merge_dequantizes_adapted_leaves_only(format, dora):
    params = {
        "q": {"kernel": quantize(normal(64, 6), format)},
        "v": {"kernel": quantize(normal(64, 6, seed=1), format)},
    }
    modules = {"q/kernel": ["q"], "v/kernel": ["v"]}
    targets = match(modules, LoraConfig(r=2, target_modules=("q",), use_dora=dora))
    adapter = init(params, targets, jax.random.key(0))
    base = dequantize(params["q"]["kernel"])
    if dora:
        norms = np.linalg.norm(base, axis=0)
        np.testing.assert_allclose(adapter["q/kernel"]["magnitude"], norms, rtol=1e-6)
    np.testing.assert_allclose(
        merge(params, adapter, targets)["q"]["kernel"], base, rtol=1e-6, atol=1e-7
    )
    merged = merge(params, trained(params, targets), targets)
    assert merged["v"]["kernel"] is params["v"]["kernel"]
    x = normal(3, 64, seed=2)
    np.testing.assert_allclose(
        x @ merged["q"]["kernel"],
        matmul(x, apply(params, trained(params, targets), targets)["q"]["kernel"]),
        rtol=1e-5,
        atol=1e-5,
    )


def test_fresh_a_is_drawn_as_in_peft():
    params = {"w": jnp.zeros((400, 30))}
    targets = match({"w": ["w"]}, LoraConfig(r=50, target_modules=("w",)))
    pair = init(params, targets, jax.random.key(0))["w"]
    # Kaiming uniform with a = sqrt 5 is uniform within 1 / sqrt(in).
    assert np.abs(pair["a"]).max() <= 400**-0.5
    # 20000 draws: standard error 0.5 %.
    assert abs(float(pair["a"].std()) * (3 * 400) ** 0.5 - 1) < 0.02
    assert not pair["b"].any()
    assert {leaf.dtype for leaf in pair.values()} == {jnp.dtype("float32")}


def test_every_leaf_and_layer_starts_with_another_a():
    adapter = init(PARAMS, targets_of(), jax.random.key(0))
    matrices = [layer for path in PATHS for layer in np.asarray(adapter[path]["a"])]
    assert len({matrix.tobytes() for matrix in matrices}) == 2 * LAYERS


@pytest.mark.parametrize("variant", ["mixed ranks", "some layers", "some layers, dora"])
def test_padding_of_mixed_ranks_stays_zero_through_training(variant):
    targets = targets_of(**VARIANTS[variant])
    adapter = trained(PARAMS, targets)
    # Weight decay and Adam's normalised steps would blow up any gradient however small.
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    state = optimizer.init(adapter)

    @jax.jit
    def step(adapter, state):
        def loss(adapter):
            return jnp.mean(run(apply(PARAMS, adapter, targets), X) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    start = adapter
    for _ in range(3):
        adapter, state = step(adapter, state)
    for path, pair in adapter.items():
        for layer, rank in enumerate(targets[path].ranks):
            assert not pair["a"][layer, :, rank:].any()
            assert not pair["b"][layer, rank:].any()
            if rank:
                changed = np.abs(pair["a"][layer, :, :rank] - start[path]["a"][layer, :, :rank])
                assert (changed > 0).all()


def test_a_layer_left_out_stays_the_base_through_training():
    targets = targets_of(target_modules=("q",), layers_to_transform=(1,), use_dora=True)
    adapter = trained(PARAMS, targets)
    adapter["layers/q/kernel"]["magnitude"] *= 1.5  # as weight decay might
    leaf = apply(PARAMS, adapter, targets)["layers"]["q"]["kernel"]
    base = PARAMS["layers"]["q"]["kernel"]
    for layer in (0, 2):
        one = jax.tree.map(lambda x, layer=layer: x[layer], leaf)
        np.testing.assert_array_equal(matmul(X, one), X @ base[layer])
        np.testing.assert_array_equal(materialize(one), base[layer])


def test_dropout_differs_between_steps_leaves_and_layers():
    targets = targets_of(dropout=0.5)
    adapter = init(PARAMS, targets, jax.random.key(0))
    one, other = (apply(PARAMS, adapter, targets, jax.random.key(seed)) for seed in (0, 1))
    keys = [np.asarray(flatten(tree)[path].key) for tree in (one, other) for path in PATHS]
    assert len({layer.tobytes() for key in keys for layer in key}) == 4 * LAYERS
    assert apply(PARAMS, adapter, targets)["layers"]["q"]["kernel"].key is None


def test_no_dropout_needs_no_key():
    targets = targets_of()
    adapter = init(PARAMS, targets, jax.random.key(0))
    leaf = apply(PARAMS, adapter, targets, jax.random.key(0))["layers"]["q"]["kernel"]
    assert leaf.key is None


@pytest.mark.parametrize(
    "variant", ["lora", "dora", "mixed ranks", "some layers", "some layers, dora"]
)
def test_count_is_the_number_of_stored_values(variant):
    targets = targets_of(**VARIANTS[variant])
    adapter = init(PARAMS, targets, jax.random.key(0))
    wanted = sum(
        rank * (IN + OUT) + (OUT if rank and "magnitude" in adapter[path] else 0)
        for path, target in targets.items()
        for rank in target.ranks
    )
    assert count(targets, adapter) == wanted
    if variant in ("lora", "dora"):
        assert wanted == sum(leaf.size for leaf in jax.tree.leaves(adapter))


def test_leaves_with_more_axes_merge_as_the_matrices_they_stand_for():
    params = {
        "query": {"kernel": normal(6, 2, 3)},
        "out": {"kernel": normal(2, 3, 6, seed=1)},
    }
    config = LoraConfig(r=2, target_modules=("query", "out"))
    targets = targets_of_tree(params, config, in_axes={"out": 2})
    adapter = trained(params, targets)
    assert adapter["query/kernel"]["a"].shape == (6, 2)
    assert adapter["out/kernel"]["a"].shape == (6, 2)
    merged = merge(params, adapter, targets)
    for name, pair in (("query", adapter["query/kernel"]), ("out", adapter["out/kernel"])):
        kernel = params[name]["kernel"]
        wanted = kernel + 4.0 * (pair["a"] @ pair["b"]).reshape(kernel.shape)
        np.testing.assert_allclose(merged[name]["kernel"], wanted, rtol=1e-5, atol=1e-6)
    assert replace(params, {}) == params


def with_bias(adapter):
    return {
        path: {**pair, "bias": normal(*pair["bias"].shape, seed=11)}
        for path, pair in adapter.items()
    }


def test_a_bias_of_b_is_scaled_and_added():
    kernel, x = normal(IN, OUT), normal(4, IN, seed=1)
    config = LoraConfig(r=2, alpha=3.0, lora_bias=True)
    targets = match({"q/kernel": ["q"]}, config)
    adapter = with_bias(init({"q": {"kernel": kernel}}, targets, jax.random.key(0)))
    bias = adapter["q/kernel"]["bias"]
    leaf = apply({"q": {"kernel": kernel}}, adapter, targets)["q"]["kernel"]
    np.testing.assert_allclose(matmul(x, leaf), x @ kernel + 1.5 * bias, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="no bias of its own"):
        merge({"q": {"kernel": kernel}}, adapter, targets)
    with pytest.raises(UserError, match="no bias of its own"):
        materialize(leaf)


def test_a_bias_of_b_joins_that_of_its_layer_and_leaves_it_again():
    params = {"q": {"kernel": normal(IN, OUT), "bias": normal(OUT, seed=2)}}
    targets = match({"q/kernel": ["q"]}, LoraConfig(r=2, alpha=3.0, lora_bias=True))
    adapter = with_bias(init(params, targets, jax.random.key(0)))
    merged = merge(params, adapter, targets)
    wanted = params["q"]["bias"] + 1.5 * adapter["q/kernel"]["bias"]
    np.testing.assert_allclose(merged["q"]["bias"], wanted, rtol=1e-6)
    applied = apply(params, adapter, targets)
    np.testing.assert_array_equal(applied["q"]["bias"], merged["q"]["bias"])
    assert applied["q"]["kernel"].bias is None
    back = unmerge(merged, adapter, targets)
    np.testing.assert_allclose(back["q"]["bias"], params["q"]["bias"], atol=1e-6)
    assert count(targets, adapter) == 2 * (IN + OUT) + OUT


def test_a_column_of_zeros_learns_under_dora():
    params = {"q": {"kernel": normal(IN, OUT).at[:, 2].set(0.0)}}
    targets = match({"q/kernel": ["q"]}, LoraConfig(r=2, use_dora=True))
    adapter = init(params, targets, jax.random.key(0))

    def loss(adapter):
        leaf = apply(params, adapter, targets)["q"]["kernel"]
        return jnp.sum((matmul(normal(4, IN, seed=5), leaf) - 1.0) ** 2)

    optimizer = optax.adam(0.02)
    state, first = optimizer.init(adapter), float(loss(adapter))
    for _ in range(100):
        updates, state = optimizer.update(jax.grad(loss)(adapter), state)
        adapter = optax.apply_updates(adapter, updates)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter))
    assert float(loss(adapter)) < 0.1 * first
    column = materialize(apply(params, adapter, targets)["q"]["kernel"])[:, 2]
    assert np.abs(column).max() > 0.01
