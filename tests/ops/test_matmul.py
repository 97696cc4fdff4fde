import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops.arrays import LoraArray
from jaxlora.ops.matmul import embed, materialize, matmul, unembed
from jaxlora.ops.quantize import FORMATS, dequantize, quantize, quantize_tokens

IN, OUT, RANK = 48, 20, 3
BASES = ["float32", *FORMATS]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def base_leaf(kind):
    weight = normal(IN, OUT, seed=1)
    return weight if kind == "float32" else quantize(weight, kind)


def lora_leaf(kind="float32", *, dora=False, key=None, dropout=0.0):
    base = base_leaf(kind)
    magnitude = None
    if dora:
        norms = jnp.linalg.norm(materialize(base), axis=0)
        magnitude = norms * (1 + 0.3 * normal(OUT, seed=5))
    return LoraArray(
        base,
        a=0.2 * normal(IN, RANK, seed=2),
        b=0.2 * normal(RANK, OUT, seed=3),
        scale=jnp.float32(1.7),
        magnitude=magnitude,
        key=key,
        dropout=dropout,
    )


def pullback(f, *inputs):
    """Value of `f` and the gradients of a fixed random projection of it."""
    y, back = jax.vjp(f, *inputs)
    return y, back(normal(*y.shape, seed=9).astype(y.dtype))


def assert_close(one, other):
    # float32 sums of 48 products, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), one, other)


X = normal(2, 5, IN, seed=4)


@pytest.mark.parametrize("format", FORMATS)
def test_quantized_matmul_equals_the_materialised_weight(format):
    leaf = base_leaf(format)
    weight = dequantize(leaf)
    assert_close(
        pullback(lambda x: matmul(x, leaf), X),
        pullback(lambda x: x @ weight, X),
    )


@pytest.mark.parametrize("kind", BASES)
def test_lora_value_and_gradients_equal_the_materialised_weight(kind):
    leaf = lora_leaf(kind)
    weight = materialize(leaf.base)

    def ours(x, a, b):
        return matmul(x, dataclasses.replace(leaf, a=a, b=b))

    def plain(x, a, b):
        return x @ (weight + leaf.scale * (a @ b))

    assert_close(pullback(ours, X, leaf.a, leaf.b), pullback(plain, X, leaf.a, leaf.b))


@pytest.mark.parametrize("kind", BASES)
def test_dora_value_and_gradients_equal_the_papers_formula(kind):
    leaf = lora_leaf(kind, dora=True)
    weight = materialize(leaf.base)

    def ours(x, a, b, magnitude):
        return matmul(x, dataclasses.replace(leaf, a=a, b=b, magnitude=magnitude))

    def plain(x, a, b, magnitude):
        directed = weight + leaf.scale * (a @ b)
        norm = jax.lax.stop_gradient(jnp.sqrt((directed**2).sum(axis=0)))
        return x @ (directed * (magnitude / norm))

    inputs = (X, leaf.a, leaf.b, leaf.magnitude)
    assert_close(pullback(ours, *inputs), pullback(plain, *inputs))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_materialize_stands_for_the_matrix_that_matmul_multiplies_by(kind, dora):
    leaf = lora_leaf(kind, dora=dora)

    def ours(a, b):
        return matmul(X, dataclasses.replace(leaf, a=a, b=b))

    def through_matrix(a, b):
        return X @ materialize(dataclasses.replace(leaf, a=a, b=b))

    assert_close(pullback(ours, leaf.a, leaf.b), pullback(through_matrix, leaf.a, leaf.b))


def test_a_layer_without_a_rank_is_its_base_even_with_dora():
    leaf = dataclasses.replace(
        lora_leaf(dora=True), a=jnp.zeros((IN, RANK)), b=jnp.zeros((RANK, OUT)), scale=jnp.zeros(())
    )

    def ours(x, magnitude):
        return matmul(x, dataclasses.replace(leaf, magnitude=magnitude))

    y, (dx, d_magnitude) = pullback(ours, X, leaf.magnitude)
    assert_close((y, (dx,)), pullback(lambda x: x @ leaf.base, X))
    np.testing.assert_array_equal(d_magnitude, 0)
    np.testing.assert_array_equal(materialize(leaf), leaf.base)


def test_frozen_leaves_get_no_gradient():
    leaf = lora_leaf("nf4")
    gradient = jax.grad(lambda leaf: matmul(X, leaf).sum(), allow_int=True)(leaf)
    for base in jax.tree.leaves(gradient.base):
        assert base.dtype == jax.dtypes.float0 or not np.asarray(base).any()
    assert np.asarray(gradient.a).any()
    assert not np.asarray(gradient.scale).any()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_keeps_the_mean(dora):
    key = jax.random.key_data(jax.random.key(0))
    leaf = lora_leaf(dora=dora, key=key, dropout=0.25)
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 4000))
    x = X[0, :2]
    y = jax.jit(jax.vmap(lambda key: matmul(x, dataclasses.replace(leaf, key=key))))(keys)
    wanted = matmul(x, dataclasses.replace(leaf, key=None))
    error = y.std(axis=0) / len(keys) ** 0.5
    # 40 outputs, each within 4.5 standard errors: fails by chance once in 3000 keys.
    assert (jnp.abs(y.mean(axis=0) - wanted) < 4.5 * error).all()
    assert (error > 0).all()


def test_dropout_drops_the_stated_share_of_the_low_rank_input_only():
    key = jax.random.key_data(jax.random.key(0))
    base = jnp.zeros((IN, IN))
    eye = jnp.eye(IN)
    x = jnp.ones((200, IN))
    leaf = LoraArray(base, eye, eye, jnp.float32(1.0), key=key, dropout=0.25)
    y = np.asarray(matmul(x, leaf))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    # 9600 draws: standard error 0.0044.
    assert abs((y == 0).mean() - 0.25) < 0.02
    kept_base = dataclasses.replace(leaf, base=eye, a=jnp.zeros_like(eye))
    np.testing.assert_array_equal(matmul(x, kept_base), x)


def test_dropout_is_off_without_a_key_and_a_function_of_the_key():
    key = jax.random.key_data(jax.random.key(0))
    leaf = lora_leaf(dropout=0.5, key=key)
    off = matmul(X, dataclasses.replace(leaf, key=None))
    np.testing.assert_array_equal(off, matmul(X, dataclasses.replace(leaf, key=None, dropout=0.0)))
    np.testing.assert_array_equal(matmul(X, leaf), matmul(X, leaf))
    other = dataclasses.replace(leaf, key=jax.random.key_data(jax.random.key(1)))
    assert np.abs(matmul(X, leaf) - matmul(X, other)).max() > 0.1
    assert np.abs(matmul(X, leaf) - off).max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_gradients_are_those_of_the_kept_inputs(dora):
    key = jax.random.key_data(jax.random.key(0))
    leaf = lora_leaf(dora=dora, key=key, dropout=0.5)
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, X.shape)

    def ours(x, a, b):
        return matmul(x, dataclasses.replace(leaf, a=a, b=b))

    def plain(x, a, b):
        dropped = jnp.where(keep, x / 0.5, 0)
        low_rank = leaf.scale * (dropped @ a @ b)
        if not dora:
            return x @ leaf.base + low_rank
        norm = jnp.linalg.norm(leaf.base + leaf.scale * (a @ b), axis=0)
        gain = leaf.magnitude / jax.lax.stop_gradient(norm)
        return x @ leaf.base + (gain - 1) * (dropped @ leaf.base) + gain * low_rank

    assert_close(pullback(ours, X, leaf.a, leaf.b), pullback(plain, X, leaf.a, leaf.b))


@pytest.mark.parametrize("kind", BASES)
def test_bfloat16_inputs_give_bfloat16_outputs_and_float32_adapter_gradients(kind):
    leaf = lora_leaf(kind, dora=True)
    x = X.astype(jnp.bfloat16)

    def ours(x, a, b):
        return matmul(x, dataclasses.replace(leaf, a=a, b=b))

    y, (dx, da, db) = pullback(ours, x, leaf.a, leaf.b)
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (x.dtype, x.dtype, jnp.float32, jnp.float32)
    exact, wanted = pullback(ours, x.astype(jnp.float32), leaf.a, leaf.b)
    for got, want in zip((y, dx, da, db), (exact, *wanted), strict=True):
        # A few roundings to 8 bits.
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert error < 0.02


def test_out_dtype_asks_for_the_dtype_of_the_output():
    x = X.astype(jnp.bfloat16)
    for leaf in (base_leaf("float32"), base_leaf("int4"), lora_leaf("nf4")):
        assert matmul(x, leaf).dtype == jnp.bfloat16
        assert matmul(x, leaf, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_embed_reads_rows_and_unembed_multiplies_by_them(kind):
    table = base_leaf(kind)
    tokens = jnp.array([[0, 47], [3, 3]])
    np.testing.assert_array_equal(embed(tokens, table), materialize(table)[tokens])
    x = normal(2, 3, OUT)
    np.testing.assert_allclose(unembed(x, table), x @ materialize(table).T, atol=1e-5)
    assert unembed(x.astype(jnp.bfloat16), table).dtype == jnp.float32


TABLES = {"embedding": (0, unembed), "head": (1, functools.partial(matmul, out_dtype="float32"))}


def table_leaf(kind):
    """A table in int8 whose tokens differ in size, as a leaf that knows it by its shape."""
    axis, _ = TABLES[kind]
    table = np.asarray(normal(IN, OUT, seed=1)) * np.geomspace(0.01, 10, IN)[:, None]
    table = table.astype(np.float32)
    return jax.tree.map(jnp.asarray, quantize_tokens(table.T if axis else table, axis)), table


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_in_8_bits_is_within_half_a_step_of_each_token(kind):
    leaf, table = table_leaf(kind)
    axis, _ = TABLES[kind]
    lost = np.abs(dequantize(leaf) - (table.T if axis else table)).max(axis=1 - axis)
    # And what rounding the largest magnitude to float16 adds, 2**-11 of it.
    assert np.all(lost <= np.abs(table).max(axis=1) * (0.5 / 127 + 2**-11))
    assert leaf.values.dtype == jnp.int8


@pytest.mark.parametrize("kind", TABLES)
def test_logits_of_a_table_in_8_bits_are_those_of_its_float32_numbers(kind):
    leaf, _ = table_leaf(kind)
    axis, product = TABLES[kind]
    weight = dequantize(leaf) if axis else dequantize(leaf).T
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-6)):
        x = normal(2, 3, OUT).astype(dtype)
        y, (dx,) = pullback(lambda x: product(x, leaf), x)
        exact, (exact_dx,) = pullback(lambda x: x @ weight, x.astype(jnp.float32))
        assert (y.dtype, dx.dtype) == (jnp.float32, dtype)
        # The codes are numbers of bfloat16: nothing is rounded but the sums,
        assert np.abs(y - exact).max() <= tolerance * np.abs(exact).max()
        # and in the gradient what is multiplied by them, once, and the result.
        rounding = 1e-5 if dtype == jnp.float32 else 2**-7
        assert np.abs(dx.astype(jnp.float32) - exact_dx).max() <= rounding * np.abs(exact_dx).max()


def test_a_lookup_in_8_bits_dequantizes_the_rows_it_takes():
    leaf, _ = table_leaf("embedding")
    tokens = jnp.array([[0, 47], [3, 3]])
    np.testing.assert_array_equal(embed(tokens, leaf), dequantize(leaf)[tokens])
    made = jax.make_jaxpr(lambda leaf: embed(tokens, leaf))(leaf).eqns
    floats = [v.aval for eqn in made for v in eqn.outvars if v.aval.dtype == jnp.float32]
    assert floats
    assert max(aval.size for aval in floats) == tokens.size * OUT


@pytest.mark.parametrize("kind", TABLES)
def test_no_dequantized_table_is_kept_for_the_backward_pass(kind):
    leaf, _ = table_leaf(kind)
    _, product = TABLES[kind]
    assert largest_float_residual(lambda x: product(x, leaf), normal(3, OUT)) <= IN


def largest_float_residual(f, x):
    """Elements of the largest float array that `f` keeps from forward to backward."""
    _, back = jax.vjp(f, x)
    sizes = [
        leaf.size for leaf in jax.tree.leaves(back) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return max(sizes, default=0)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_no_dequantized_weight_is_kept_for_the_backward_pass(format, dora):
    x = X[0]
    leaf = lora_leaf(format, dora=dora)
    assert x.size < IN * OUT
    assert largest_float_residual(lambda x: matmul(x, leaf), x) < IN * OUT
    # The same look at autodiff's own way does see one.
    assert largest_float_residual(lambda x: x @ dequantize(leaf.base), x) == IN * OUT


def test_gradient_of_wide_products_is_that_of_float32_but_for_roundings():
    """Logits are float32 of bfloat16 factors; their gradient is rounded before it is multiplied."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, dy = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((5, 64), (64, 96), (5, 96)), strict=True)
    )
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    y, back = jax.vjp(lambda x, w: matmul(x, w, out_dtype=jnp.float32), x, w)
    assert y.dtype == jnp.float32
    exact, exact_back = jax.vjp(jnp.matmul, x.astype(jnp.float32), w.astype(jnp.float32))
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(back(dy), exact_back(dy), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.abs(np.asarray(got, np.float32) - wanted).max() < 2**-7 * np.abs(wanted).max()


@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_recomputed_layers_keep_no_array_of_a_matrix_between_them(format):
    """Constants of a matrix' size would be moved out of the loop over layers, and all be kept."""
    layers, rows, into, out = 3, 8, 256, 384
    one = quantize(np.random.default_rng(0).standard_normal((into, out)).astype(np.float32), format)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), one)

    def loss(x, base):
        def layer(x, weight):
            return jax.nn.silu(matmul(x, weight)) @ jnp.ones((out, into)), None

        layer = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(layer, x, base)[0].sum()

    x = jax.ShapeDtypeStruct((rows, into), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(x, base).compile()
    # One unpacked matrix, one product, and the ones above: not 14 tables of the matrix' size.
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * into * out * 4


def test_low_rank_gradients_in_bfloat16_run_in_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    x, a, b = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, 16, 32), (32, 4), (4, 32)), strict=True)
    )

    @functools.partial(jax.jit, static_argnums=3)
    def gradients(x, a, b, dtype):
        def loss(a, b):
            def layer(x, _):
                weight = LoraArray(jnp.zeros((32, 32), dtype), a, b, jnp.float32(0.1))
                return x + matmul(x, weight), None

            return jax.lax.scan(layer, x.astype(dtype), None, 2)[0].astype(jnp.float32).std()

        return jax.grad(loss, (0, 1))(a, b)

    rough, exact = (gradients(x, a, b, dtype) for dtype in ("bfloat16", "float32"))
    for got, wanted in zip(rough, exact, strict=True):
        assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
