"""How cuDNN's kernels are called, with stand-ins that compute what the kernels promise.

The kernels themselves are compared on a GPU, by `benchmarks/gpu_checks.py`.
"""

import enum
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import inputs, value_and_gradients, visible

from jaxlora.ops import attention_cudnn
from jaxlora.ops.attention import reference_attention
from jaxlora.ops.attention_cudnn import CudnnAttention


class MaskType(enum.Enum):
    NO_MASK = 0
    PADDING = 1
    CAUSAL = 2
    PADDING_CAUSAL = 3


class AttentionLayout(enum.Enum):
    BTNH = 0


def spans_of(q, q_seqlen, q_offsets):
    """Segment of each place from lengths, or lengths and offsets; -1 where there is none."""
    place = jnp.arange(q.shape[1])
    if q_seqlen.ndim == 1 and q_seqlen.size:
        return jnp.where(place < q_seqlen[:, None], 1, -1)
    if not q_seqlen.size:
        return jnp.ones(q.shape[:2], int)
    begin, end = q_offsets[:, :-1], q_offsets[:, :-1] + q_seqlen
    inside = (place >= begin[..., None]) & (place < end[..., None]) & (begin[..., None] >= 0)
    return jnp.where(inside.any(axis=1), jnp.argmax(inside, axis=1) + 1, -1)


def kernel(q, k, v, bias, q_seqlen, _, q_offsets, *rest):
    """What is promised, and NaN where nothing is."""
    scale, _, _, (has_bias, _), mask_type, _, window, *_ = rest[3:]
    segments, place = spans_of(q, q_seqlen, q_offsets), jnp.arange(q.shape[1])
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    distance = place[:, None] - place
    if mask_type in (MaskType.CAUSAL, MaskType.PADDING_CAUSAL):
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale + (bias if has_bias else 0)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    y = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
    return jnp.where((segments > 0)[..., None, None], y, jnp.nan)


def forward_rule(*operands):
    y = kernel(*operands)
    return y, (*operands[:10], jnp.zeros(y.shape[:3]), y)


def backward_rule(*options_kept_and_gradient):
    *options, (q, k, v, *others, _, _), dy = options_kept_and_gradient
    _, back = jax.vjp(lambda q, k, v: kernel(q, k, v, *others, *options), q, k, v)
    return (*back(dy), *[None] * 7)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    module = types.SimpleNamespace(
        MaskType=MaskType,
        AttentionLayout=AttentionLayout,
        check_cudnn_version=lambda: 91900,
        get_large_negative_number=lambda dtype: -1e30,
        _dot_product_attention=kernel,
        _dot_product_attention_fwd_rule=forward_rule,
        _dot_product_attention_bwd_rule=backward_rule,
    )
    monkeypatch.setattr(attention_cudnn, "_kernels", lambda: module)
    # The stand-ins compute in float32, so that an error shows.
    monkeypatch.setattr(attention_cudnn, "cannot", lambda *args, **options: None)


SEEN = {
    "causal": {},
    "second of two windows": {"windows": (None, 3), "kind": 1},
    "both ways": {"causal": False},
    "both ways, window": {"causal": False, "windows": (4, None)},
}


@pytest.mark.parametrize("most_segments", [3, None], ids=["offsets", "bias"])
@pytest.mark.parametrize("seen", SEEN)
def test_packed_rows_are_kept_apart(seen, most_segments):
    check(CudnnAttention(most_segments), visible(**SEEN[seen]))


def test_rows_of_one_example_end_where_padding_begins():
    check(CudnnAttention(1), visible(lengths=((24,), (29,))))


def check(attend, seen):
    # As in a model: in a loop, and recomputed.
    def in_a_scan(q, k, v, seen, **options):
        def layer(x, number):
            return x + attend(q, k, v, seen, **options) * number, None

        layer = jax.checkpoint(
            layer, policy=jax.checkpoint_policies.save_only_these_names("attention")
        )
        return jax.lax.scan(layer, jnp.zeros_like(q), jnp.array([0.25, 0.75]))[0]

    got = value_and_gradients(in_a_scan, seen, inputs())
    wanted = value_and_gradients(reference_attention, seen, inputs())
    for ours, theirs in zip(got, wanted, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_what_the_backward_pass_reads_is_saved_by_name():
    """With the policy the kernel runs once for each layer, without it twice."""

    def runs(**policy):
        attend = jax.checkpoint(
            lambda q, k, v: CudnnAttention(3)(q, k, v, visible()).sum(), **policy
        )
        *qkv, _ = inputs()
        text = str(jax.make_jaxpr(jax.grad(attend))(*qkv))
        return text.count("exp ")

    saved = jax.checkpoint_policies.save_only_these_names("attention")
    assert runs(policy=saved) < runs()
