import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops.rope import RopeScaling, rope_angles, rope_frequencies, rotate

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def rotated(x, positions, theta=1e4, scaling=None):
    angles = rope_angles(positions, x.shape[-1], theta, scaling)
    return rotate(x, angles)


def test_frequencies_are_powers_of_theta():
    np.testing.assert_allclose(rope_frequencies(4, 1e4, None), [1.0, 0.01], rtol=1e-6)


@pytest.mark.parametrize(("head_dim", "theta"), [(10, 1e4), (64, 1e4), (128, 1e4), (128, 5e5)])
def test_frequencies_are_transformers_bit_for_bit(head_dim, theta):
    # At 100,000 tokens one rounding of a frequency turns a pair by a hundredth of a radian.
    torch = pytest.importorskip("torch")
    theirs = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    np.testing.assert_array_equal(rope_frequencies(head_dim, theta, None), theirs.numpy())


def test_linear_scaling_equals_nearer_positions():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 2, 6)), jnp.float32)
    positions = jnp.arange(0, 32, 4)[None]
    scaled = rotated(x, positions, scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled, rotated(x, positions // 4), atol=1e-5)


def test_llama3_scaling_keeps_fast_divides_slow_and_blends_between():
    plain, scaled = rope_frequencies(128, 5e5, None), rope_frequencies(128, 5e5, LLAMA3)
    ratio, turns = scaled / plain, 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8, rtol=1e-6)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 3
    assert (np.diff(ratio) <= 0).all()
    assert ((between > 1 / 8) & (between < 1)).all()


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 8)), jnp.float32)

    def score(query_position, key_position):
        turned = [
            rotated(x, jnp.array([[at]])) for x, at in ((q, query_position), (k, key_position))
        ]
        return jnp.sum(turned[0] * turned[1])

    # float32 angles near 1000 are good to 6e-5.
    np.testing.assert_allclose(score(1007, 1000), score(7, 0), atol=1e-3)
    assert abs(score(8, 0) - score(7, 0)) > 1e-2


def test_position_zero_changes_nothing_and_norms_are_kept():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 8)), jnp.float32)
    np.testing.assert_array_equal(rotated(x, jnp.zeros((2, 5), int)), x)
    turned = rotated(x, jnp.arange(10).reshape(2, 5))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


@pytest.mark.parametrize("position", [257, 4095])
def test_angles_of_bfloat16_models_are_computed_in_float32(position):
    # bfloat16 cannot tell 257 from 256.
    cos, sin = rope_angles(jnp.array([[position]]), 4, 1e4)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(sin[0, 0, 0, 0], np.sin(position), atol=1e-4)
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    assert rotated(x, jnp.array([[position]])).dtype == jnp.bfloat16


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_turns_back_and_rounds_once(interleaved):
    angles = rope_angles(jnp.arange(5)[None], 8, 1e4)
    x, dy = (jax.random.normal(jax.random.key(seed), (1, 5, 2, 12)) for seed in (0, 1))

    def gradient(x, dy):
        return jax.vjp(lambda x: rotate(x, angles, interleaved=interleaved), x)[1](dy)[0]

    # The transposed rotation, one column for each channel turned by itself.
    each = jnp.eye(12)[None, None].repeat(5, 1)
    columns = rotate(each, angles, interleaved=interleaved)
    np.testing.assert_allclose(
        gradient(x, dy), jnp.einsum("btno,btio->btni", dy, columns), atol=1e-6
    )
    half = dy.astype(jnp.bfloat16)
    exact = gradient(x, half.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gradient(x.astype(jnp.bfloat16), half), exact)
