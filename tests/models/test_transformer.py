import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.tree import flatten, replace
from jaxlora.lora import LoraConfig, apply, init, match
from jaxlora.models import layers
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import REMAT_POLICIES, Transformer, bind, empty_cache
from jaxlora.ops.loss import chunked_cross_entropy
from jaxlora.ops.matmul import materialize
from jaxlora.ops.quantize import FORMATS, quantize

CFG = ModelConfig(
    vocab_size=31,
    embed_dim=64,
    mlp_dim=80,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=32,
    norm_eps=1e-5,
    rope_theta=1e4,
)


def scaled_params(cfg, seed=0):
    """Weights that keep activations and logits near 1, where fresh ones would hide mistakes."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, spec in describe(cfg).items():
        noise = rng.standard_normal(spec.full_shape).astype(np.float32)
        fan_in = spec.shape[1] if spec.kind == "embedding" else spec.shape[0]
        leaves[path] = jnp.asarray(
            1 + 0.2 * noise if spec.kind == "norm" else noise / fan_in**0.5 * 1.2
        )
    return replace({}, leaves)


PARAMS = scaled_params(CFG)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def logits_of(params, tokens, positions, segments, cfg=CFG, dtype="float32"):
    model = bind(Transformer(cfg, dtype=dtype), params)
    return model.logits(model(tokens, positions, segments)[0])


def row(*lengths, padding=0, seed=0):
    """One packed row: tokens, positions, segments, each [1, T]."""
    tokens = np.random.default_rng(seed).integers(0, CFG.vocab_size, sum(lengths) + padding)
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding)]).astype(int)
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    return tokens[None], positions[None], segments[None]


@pytest.mark.parametrize("window", [None, 3])
def test_packed_segments_give_the_logits_they_give_alone(window):
    cfg = dataclasses.replace(CFG, sliding_window=window)
    packed = row(5, 7, 1, 4, padding=3)
    together = logits_of(PARAMS, *packed, cfg=cfg)[0]
    start = 0
    for length in (5, 7, 1, 4):
        # Padded to one shape, so that all four share one compilation.
        part = slice(start, start + length)
        tokens = np.zeros((1, 20), int)
        tokens[0, :length] = packed[0][0, part]
        _, positions, segments = row(length, padding=20 - length)
        alone = logits_of(PARAMS, tokens, positions, segments, cfg=cfg)[0, :length]
        # float32; masked scores contribute exact zeros.
        np.testing.assert_allclose(together[part], alone, atol=1e-5)
        start += length


def test_logits_of_a_packed_row_would_differ_without_segments():
    tokens, positions, segments = row(5, 7, 1, 4, padding=3)
    together = logits_of(PARAMS, tokens, positions, segments)
    assert np.abs(logits_of(PARAMS, tokens, positions, segments > 0) - together).max() > 0.1


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(left):
    tokens, positions, segments = row(9)
    alone = logits_of(PARAMS, tokens, positions, segments)
    width = ((0, 0), (4, 0) if left else (0, 4))
    padded = [np.pad(x, width) for x in (tokens, positions, segments)]
    kept = slice(4, 13) if left else slice(0, 9)
    np.testing.assert_allclose(logits_of(PARAMS, *padded)[:, kept], alone, atol=1e-5)


def test_no_token_sees_a_later_one():
    tokens, positions, segments = row(9)
    changed = tokens.copy()
    changed[0, 6] = (changed[0, 6] + 1) % CFG.vocab_size
    before = logits_of(PARAMS, tokens, positions, segments)
    after = logits_of(PARAMS, changed, positions, segments)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[0, 6:].max(axis=-1) > 1e-3).all()


def test_cache_gives_the_logits_of_the_whole_sequence():
    tokens, positions, segments = row(9)
    wanted = logits_of(PARAMS, tokens, positions, segments)

    @jax.jit
    def two_steps(params):
        model = bind(Transformer(CFG), params)
        cache = empty_cache(CFG, 1, 12, jnp.float32)
        pieces = []
        for part in (slice(0, 6), slice(6, 9)):
            hidden, cache = model(tokens[:, part], positions[:, part], segments[:, part], cache)
            pieces.append(model.logits(hidden))
        return jnp.concatenate(pieces, axis=1), cache.index

    logits, index = two_steps(PARAMS)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert index == 9


def test_bfloat16_runs_close_to_float32():
    inputs = row(9, 8)
    exact = logits_of(PARAMS, *inputs)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    rough = logits_of(half, *inputs, dtype="bfloat16")
    assert rough.dtype == jnp.float32
    # 8 bits through 4 layers: about 1 % of a standard deviation of 1.4.
    error = np.sqrt(np.mean((rough - exact) ** 2)) / exact.std()
    assert 1e-4 < error < 0.03


def make_loss(cfg=CFG, remat="none", length=8):
    tokens, positions, segments = (jnp.asarray(x) for x in row(length - 1, padding=1))
    targets, weights = jnp.roll(tokens, -1, axis=1), (segments > 0).astype(jnp.float32)

    def loss(params):
        model = bind(Transformer(cfg, remat=remat), params)
        hidden, _ = model(tokens, positions, segments)
        return chunked_cross_entropy(model.logits, hidden, targets, weights, chunk_tokens=4)

    return loss


def test_remat_policies_give_equal_loss_and_gradients():
    results = {
        remat: jax.jit(jax.value_and_grad(make_loss(remat=remat)))(PARAMS)
        for remat in REMAT_POLICIES
    }
    wanted, wanted_gradients = results.pop("none")
    assert len(results) == 4
    for loss, gradients in results.values():
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        for path, gradient in flatten(gradients).items():
            reference = flatten(wanted_gradients)[path]
            scale = np.abs(reference).max()
            assert scale > 0, path
            np.testing.assert_allclose(gradient, reference, atol=1e-5 * scale, err_msg=path)


def residual_bytes(remat):
    back = jax.eval_shape(lambda params: jax.vjp(make_loss(remat=remat), params)[1], PARAMS)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))


def test_remat_policies_are_a_ladder_from_least_memory_to_most():
    sizes = [residual_bytes(remat) for remat in ("full", "attention", "matmuls", "none")]
    assert sizes == sorted(set(sizes)), sizes


def test_offload_puts_the_inputs_of_layers_and_nothing_else_in_the_memory_of_the_host():
    def on_host(remat):
        text = str(jax.make_jaxpr(jax.grad(make_loss(remat=remat)))(PARAMS))
        return set(re.findall(r"<host>\[([\d,]+)\]", text))

    assert on_host("offload") == {"1,8,64", f"{CFG.num_layers},1,8,64"}, "one row of 8 tokens"
    assert not on_host("full")


def test_bind_refuses_a_tree_of_another_shape():
    with pytest.raises(ValueError, match="expected 12 leaves, but got 11"):
        logits_of({k: v for k, v in PARAMS.items() if k != "lm_head"}, *row(4))


# --- What a 4-bit base keeps from forward to backward ---------------------------------------------

LINEAR = {path: spec for path, spec in describe(CFG).items() if spec.kind == "linear"}
SMALLEST_STACK = min(spec.size for spec in LINEAR.values())


def quantized_params(format):
    flat = flatten(PARAMS)
    leaves = {}
    for path in LINEAR:
        matrices = [quantize(matrix, format) for matrix in np.asarray(flat[path])]
        leaves[path] = jax.tree.map(lambda *layer: jnp.stack(layer), *matrices)
    return replace(PARAMS, leaves)


def adapter_loss(format, dora=False):
    """Loss as a function of the adapter and the frozen base, no rematerialisation."""
    base = quantized_params(format)
    modules = {path: spec.modules() for path, spec in LINEAR.items()}
    targets = match(modules, LoraConfig(r=2, use_dora=dora), stacked=modules)
    adapter = init(base, targets, jax.random.key(0))
    loss = make_loss(length=5)
    return (lambda adapter, base: loss(apply(base, adapter, targets))), adapter, base


def float_residuals(loss, adapter, base):
    # The pullback is a pytree of what it keeps; nothing needs to run to see its shapes.
    back = jax.eval_shape(
        lambda adapter: jax.vjp(lambda adapter: loss(adapter, base), adapter)[1], adapter
    )
    return [x.shape for x in jax.tree.leaves(back) if jnp.issubdtype(x.dtype, jnp.floating)]


def compiled_float_shapes(loss, adapter, base):
    text = jax.jit(jax.grad(loss)).lower(adapter, base).compile().as_text()
    found = re.findall(r"\b(?:f16|bf16|f32|f64)\[([\d,]+)\]", text)
    return [tuple(map(int, shape.split(","))) for shape in sorted(set(found))]


def too_large(shapes):
    """Every other float array here is smaller than the smallest stack of weights."""
    return [shape for shape in shapes if np.prod(shape) >= SMALLEST_STACK]


def autodiff_matmul(x, weight, *, out_dtype=None):
    return jnp.matmul(x, materialize(weight, x.dtype), preferred_element_type=out_dtype)


@pytest.mark.parametrize(("format", "dora"), [*((f, False) for f in FORMATS), ("nf4", True)])
def test_no_dequantized_weight_survives_from_forward_to_backward(format, dora):
    assert not too_large(float_residuals(*adapter_loss(format, dora)))


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_compiled_gradient_has_no_buffer_of_a_dequantized_stack(format):
    assert not too_large(compiled_float_shapes(*adapter_loss(format)))


def test_both_looks_see_what_plain_autodiff_keeps(monkeypatch):
    monkeypatch.setattr(layers, "matmul", autodiff_matmul)
    loss, adapter, base = adapter_loss("int4")
    assert (4, 64, 80) in too_large(float_residuals(loss, adapter, base))
    assert (4, 64, 80) in too_large(compiled_float_shapes(loss, adapter, base))
