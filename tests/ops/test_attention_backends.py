"""Every implementation of attention gives the reference's values and gradients."""

import dataclasses
import functools
import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import T, inputs, value_and_gradients, visible

from jaxlora.ops import attention_cudnn, attention_splash
from jaxlora.ops.attention import Visibility, for_each_window, reference_attention
from jaxlora.ops.attention_chunked import chunked_attention
from jaxlora.ops.attention_splash import SplashAttention


def assert_equal(attend, seen, arrays, atol=2e-6, **options):
    got = value_and_gradients(attend, seen, arrays, **options)
    wanted = value_and_gradients(reference_attention, seen, arrays, **options)
    for ours, theirs in zip(got, wanted, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-5)


SEEN = {
    "causal": {},
    "window": {"windows": (5,)},
    "second of two windows": {"windows": (None, 3), "kind": 1},
    "both ways": {"causal": False},
    "both ways, window": {"causal": False, "windows": (4, None)},
    "keys elsewhere": {"in_place": False, "windows": (6,)},
}


@pytest.mark.parametrize("seen", SEEN)
def test_chunks_change_nothing(seen):
    attend = functools.partial(chunked_attention, chunk=7)
    assert_equal(attend, visible(**SEEN[seen]), inputs())


def test_chunks_change_nothing_with_softcap_sinks_scale_and_narrow_values():
    arrays = inputs(value_dim=4)
    sinks = jnp.array([0.5, -1.0, 2.0, 0.0])
    options = {"softcap": 2.0, "scale": 0.7}
    attend = functools.partial(chunked_attention, chunk=8)
    assert_equal(attend, visible(), arrays, sinks=sinks, **options)


def test_chunks_add_up_gradients_of_keys_in_float32():
    """In bfloat16 the sum over 10 chunks would be off by several roundings of the whole."""
    half = [x.astype(jnp.bfloat16) for x in inputs()]
    exact = value_and_gradients(
        reference_attention, visible(), [x.astype(jnp.float32) for x in half]
    )
    attend = functools.partial(chunked_attention, chunk=3)
    for got, wanted in zip(value_and_gradients(attend, visible(), half), exact, strict=True):
        error = np.abs(np.asarray(got, np.float32) - wanted).max() / np.abs(wanted).max()
        assert error < 2**-7  # scores, weights and the result are rounded once each


def test_no_scores_of_a_whole_row_are_made():
    length = 512
    positions = jnp.arange(length)[None]
    ones = jnp.ones_like(positions)
    seen = Visibility(positions, positions, ones, ones, in_place=True)
    x = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)

    def largest(attend):
        def loss(q, k, v):
            return attend(q, k, v, seen).sum()

        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
        return f"{length}x{length}x" in text

    assert largest(reference_attention)
    assert not largest(chunked_attention)


@pytest.mark.parametrize("seen", ["causal", "second of two windows", "both ways, window"])
def test_splash_equals_the_reference(seen):
    """The TPU's kernels, interpreted."""
    arrays = inputs(heads=2, kv_heads=1)
    assert_equal(SplashAttention(interpret=True), visible(**SEEN[seen]), arrays, atol=2e-5)


def test_splash_equals_the_reference_with_softcap_scale_and_narrow_values():
    arrays = inputs(heads=2, kv_heads=1, value_dim=4)
    options = {"softcap": 2.0, "scale": 0.7}
    assert_equal(SplashAttention(interpret=True), visible(), arrays, atol=2e-5, **options)


# Of blocks of 16: windows that end in a block, that leave out one number of it, and all but one.
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 40, 31, 34, 32])
def test_blocks_that_one_number_describes_are_those_of_the_whole_mask(causal, window):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    length, block = 128, (16, 16)
    ours = attention_splash.mask(length, causal, window)
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = np.abs(distance) < (window or length)
    plain = masks.NumpyMask(seen & ((distance >= 0) | (not causal)))
    for process in (info.process_mask, info.process_mask_dkv):
        got, function = process(masks.MultiHeadMask([ours] * 2), block)
        wanted, _ = process(masks.MultiHeadMask([plain] * 2), block)
        np.testing.assert_array_equal(got.block_mask, wanted.block_mask)
        np.testing.assert_array_equal(got.data_next, wanted.data_next)
        whole = plain.array if function is None else function(*np.ogrid[:length, :length])
        np.testing.assert_array_equal(whole, plain.array)


def test_a_window_that_holds_the_row_is_none():
    asked = []

    def attend(window):
        asked.append(window)
        return jnp.zeros(())

    for_each_window(visible(windows=(T, None, T - 1)), T, attend)
    assert asked == [None, T - 1]


def test_cudnn_says_what_it_cannot():
    fine = {"softcap": None, "sinks": False}
    assert attention_cudnn.cannot("bfloat16", 128, 128, **fine) is None
    cases = {
        "float32": ("float32", 128, 128, fine),
        "channels": ("bfloat16", 100, 100, fine),
        "up to 256": ("bfloat16", 512, 512, fine),
        "one width": ("bfloat16", 192, 128, fine),
        "softcap": ("bfloat16", 128, 128, fine | {"softcap": 30.0}),
        "sinks": ("bfloat16", 128, 128, fine | {"sinks": True}),
    }
    for words, (*arguments, options) in cases.items():
        assert words in attention_cudnn.cannot(*arguments, **options)


def test_cudnn_is_left_alone_where_its_interface_is_another(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    def other(query, key, value):
        raise AssertionError

    monkeypatch.setattr(fused_attention_stablehlo, "_dot_product_attention_fwd_rule", other)
    assert "another interface" in attention_cudnn.missing()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it is here")
def test_cudnn_that_is_not_here_is_told_from_an_interface_that_changed():
    assert "not on this machine" in attention_cudnn.missing()


def test_spans_name_every_segment_by_length_and_place():
    lengths, offsets = attention_cudnn.spans(visible().query_segments, 4)
    assert lengths.tolist() == [[9, 1, 14, -1], [29, -1, -1, -1]]
    assert offsets.tolist() == [[0, 9, 10, -1, -1], [0, -1, -1, -1, -1]]


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
def test_splash_compiles_for_a_tpu_that_is_not_here():
    program = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxlora.ops.attention import Visibility
from jaxlora.ops.attention_splash import SplashAttention
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
def loss(q, k, v, tokens, kind):
    seen = Visibility(tokens, tokens, tokens, tokens, kind, (None, 128), in_place=True)
    return SplashAttention()(q, k, v, seen, softcap=30.0).astype(jnp.float32).sum()
tokens = array(2, 300, dtype=jnp.int32)
heads = [array(2, 300, n, 64) for n in (4, 2, 2)]
step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*heads, tokens, array(dtype=jnp.int32))
print(step.compile().as_text().count("tpu_custom_call"))
"""
    there = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | there, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # For both windows: the forward kernel, and those for dq and for dk and dv.
    assert int(done.stdout) >= 6


def test_visibility_of_a_layer_differs_in_its_number_only():
    one, two = visible(windows=(None, 3)), visible(windows=(None, 3), kind=1)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    same = dataclasses.replace(two, windows=(3,), kind=0)
    np.testing.assert_array_equal(two.mask(), same.mask())
    assert (one.mask() != two.mask()).any()
