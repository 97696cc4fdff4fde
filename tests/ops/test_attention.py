import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops.attention import Visibility, masked_attention


def naive(q, k, v, mask):
    """Loops over rows, heads and queries; head n reads key-value head n // (N / K)."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, :, n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.where(mask[b, t], np.exp(scores - scores[mask[b, t]].max()), 0)
        out[b, t, n] = weights @ v[b, :, n // group] / weights.sum()
    return out


def mask_of(positions, segments, window):
    return Visibility(positions, positions, segments, segments, windows=(window,)).mask()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_equals_a_loop_over_queries(heads, kv_heads, window):
    q, k, v = (
        normal(2, 7, count, 5, seed=seed) for seed, count in enumerate((heads, kv_heads, kv_heads))
    )
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])
    mask = mask_of(positions, segments, window)
    y = masked_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    # float32 against float64.
    np.testing.assert_allclose(y, naive(q, k, v, np.asarray(mask)), atol=2e-6)


def test_mask_is_causal_within_a_segment_and_a_window():
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    seen = mask_of(positions, segments, 2)[0].astype(int)
    np.testing.assert_array_equal(
        seen,
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
    )


def test_window_counts_the_query_itself():
    positions, segments = jnp.arange(9)[None], jnp.ones((1, 9), int)
    for window in (1, 4, 9):
        mask = mask_of(positions, segments, window)
        assert mask.sum(axis=-1).max() == window


def test_a_query_that_sees_nothing_stays_finite():
    q = jnp.ones((1, 2, 2, 4))
    mask = jnp.zeros((1, 2, 2), bool)
    value, gradient = jax.value_and_grad(lambda q: masked_attention(q, q, q, mask).sum())(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bfloat16_scores_are_summed_in_float32():
    # Scores of 256.9 and 256, which bfloat16 rounds to the same number.
    q = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    k = jnp.array([[256.0, 0.8984375], [256.0, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.array([[1.0, 1.0], [0.0, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    y = masked_attention(q, k, v, jnp.ones((1, 1, 2), bool))
    assert y.dtype == jnp.bfloat16
    # 0.654; one rounding of the weight to bfloat16.
    expected = 1 / (1 + np.exp(-0.8984375 / np.sqrt(2)))
    np.testing.assert_allclose(float(y[0, 0, 0, 0]), expected, atol=2e-3)
