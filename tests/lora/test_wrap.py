"""`wrap` on models that know nothing of jaxlora, against autodiff through formed weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.core.tree import flatten, replace
from jaxlora.lora import LoraConfig, apply, init, merge, targets_of_tree, wrap
from jaxlora.ops.matmul import matmul
from jaxlora.ops.quantize import FORMATS, dequantize, quantize

DIM, HEADS, HEAD_DIM = 8, 2, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((HEADS, HEAD_DIM), name="query")(x)
        k = nn.DenseGeneral((HEADS, HEAD_DIM), name="key")(x)
        y = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k)) @ q.swapaxes(0, 1)
        x = x + nn.DenseGeneral(DIM, axis=(-2, -1), name="out")(y.swapaxes(0, 1))
        return nn.Dense(5, name="head")(nn.LayerNorm()(nn.silu(nn.Dense(DIM, name="up")(x))))


class NnxBlock(nnx.Module):
    """Twelve layers in a list: NNX numbers them, and as text "10" would sort before "2"."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(12)])
        self.heads = nnx.LinearGeneral((2, 4), 3, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return self.heads(x.reshape(*x.shape[:-1], 2, 4))


X = normal(6, DIM, seed=1)


def linen_model():
    module = LinenBlock()
    params = module.init(jax.random.key(0), X)["params"]
    names = ("query", "out", "up", "head")
    return (lambda params, x: module.apply({"params": params}, x)), params, names, {"out": 2}


def nnx_model():
    graphdef, state = nnx.split(NnxBlock(nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    names = ("layers.2", "layers.10", "heads")
    return (lambda params, x: nnx.merge(graphdef, params)(x)), params, names, {"heads": 2}


def nonzero(adapter):
    return {
        path: {**pair, "b": 0.3 * normal(*pair["b"].shape, seed=number)}
        for number, (path, pair) in enumerate(sorted(adapter.items()))
    }


@pytest.mark.parametrize("make_model", [linen_model, nnx_model], ids=["linen", "nnx"])
def test_gradients_equal_autodiff_through_formed_weights(make_model):
    model, params, names, in_axes = make_model()
    config = LoraConfig(r=2, alpha=3.0, target_modules=names)
    targets = targets_of_tree(params, config, in_axes=in_axes)
    adapter = nonzero(init(params, targets, jax.random.key(0)))
    wrapped = wrap(model, targets)
    np.testing.assert_allclose(
        wrapped(params, init(params, targets, jax.random.key(0)), X), model(params, X), rtol=1e-6
    )

    def plain(adapter):
        formed = {
            path: flatten(params)[path]
            + 1.5 * (pair["a"] @ pair["b"]).reshape(flatten(params)[path].shape)
            for path, pair in adapter.items()
        }
        return jnp.sum(jnp.sin(model(replace(params, formed), X)))

    def ours(adapter):
        return jnp.sum(jnp.sin(wrapped(params, adapter, X)))

    wanted, wanted_gradients = jax.jit(jax.value_and_grad(plain))(adapter)
    loss, gradients = jax.jit(jax.value_and_grad(ours))(adapter)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert set(gradients) == set(targets)
    for path, pair in gradients.items():
        for name, gradient in pair.items():
            assert np.abs(gradient).max() > 1e-3, (path, name)
            np.testing.assert_allclose(gradient, wanted_gradients[path][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_quantized_base_of_a_third_party_model(format):
    module = nn.Dense(6, name="dense")
    x = normal(3, 64)
    variables = {"params": {"kernel": normal(64, 6, seed=1), "bias": normal(6, seed=2)}}
    quantized = replace(
        variables, {"params/kernel": quantize(variables["params"]["kernel"], format)}
    )
    dequantized = replace(variables, {"params/kernel": dequantize(quantized["params"]["kernel"])})
    targets = targets_of_tree(variables, LoraConfig(r=2, target_modules=("params",)))
    adapter = nonzero(init(quantized, targets, jax.random.key(0)))
    wrapped = wrap(module.apply, targets)

    def loss(params):
        return lambda adapter: jnp.sum(jnp.sin(wrapped(params, adapter, x)))

    def plain(adapter):
        return jnp.sum(jnp.sin(module.apply(merge(dequantized, adapter, targets), x)))

    wanted = jax.value_and_grad(plain)(adapter)
    got = jax.value_and_grad(loss(quantized))(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


def test_quantized_leaves_without_an_adapter_reach_the_model_as_arrays():
    params = {
        "frozen": {"kernel": quantize(normal(64, 64), "int4")},
        "dense": {"kernel": normal(64, 6, seed=1)},
    }
    targets = targets_of_tree(params, LoraConfig(r=2, target_modules=("dense",)))
    seen = wrap(lambda params: params["frozen"]["kernel"], targets)
    kernel = seen(params, init(params, targets, jax.random.key(0)))
    np.testing.assert_array_equal(kernel, dequantize(params["frozen"]["kernel"]))


@pytest.mark.parametrize("dora", [False, True])
def test_wrap_and_apply_train_alike(dora):
    params = {"dense": {"kernel": normal(64, 6)}}
    config = LoraConfig(r=2, target_modules=("dense",), use_dora=dora)
    targets = targets_of_tree(params, config)
    adapter = nonzero(init(params, targets, jax.random.key(0)))
    x = normal(3, 64, seed=3)
    wrapped = wrap(lambda params, x: x @ params["dense"]["kernel"], targets)

    def applied(adapter):
        return jnp.sum(jnp.sin(matmul(x, apply(params, adapter, targets)["dense"]["kernel"])))

    got = jax.value_and_grad(lambda adapter: jnp.sum(jnp.sin(wrapped(params, adapter, x))))(adapter)
    wanted = jax.value_and_grad(applied)(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_frozen_weights_get_no_gradient():
    params = {"dense": {"kernel": normal(5, 3), "bias": normal(3, seed=1)}}
    targets = targets_of_tree(params, LoraConfig(r=2, target_modules=("dense",)))
    adapter = nonzero(init(params, targets, jax.random.key(0)))
    f = wrap(lambda p, x: (x @ p["dense"]["kernel"] + p["dense"]["bias"]).sum(), targets)
    gradient = jax.grad(f)(params, adapter, normal(2, 5))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_formed_weights_are_not_kept_for_the_backward_pass():
    params = {"dense": {"kernel": quantize(normal(64, 48), "int4")}}
    targets = targets_of_tree(params, LoraConfig(r=2, target_modules=("dense",)))
    adapter = nonzero(init(params, targets, jax.random.key(0)))
    x = normal(3, 64)

    def forward(params, x):
        return jnp.tanh(jnp.tanh(x @ params["dense"]["kernel"]) @ params["dense"]["kernel"].T)

    wrapped = wrap(forward, targets)

    def floats(f):
        leaves = jax.tree.leaves(jax.vjp(f, adapter)[1])
        return max(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    assert floats(lambda adapter: wrapped(params, adapter, x)) < 64 * 48
    # The same look without `wrap`'s recomputation does see one.
    assert floats(lambda adapter: forward(merge(params, adapter, targets), x)) >= 64 * 48
