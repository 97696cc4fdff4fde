import jax
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig
from jaxlora.lora.initializers import changes_base, random_pair, split
from jaxlora.ops.matmul import materialize
from jaxlora.ops.quantize import FORMATS, quantize

KEY = jax.random.key(0)
RANKS = (4, 0, 2)


def weight(in_dim=64, out_dim=48, seed=0):
    """Singular values that fall off, as those of trained weights do."""
    rng = np.random.default_rng(seed)
    falling = 1 / np.arange(1, 1 + min(in_dim, out_dim))
    u = np.linalg.qr(rng.standard_normal((in_dim, falling.size)))[0]
    v = np.linalg.qr(rng.standard_normal((out_dim, falling.size)))[0]
    return ((u * falling) @ v.T).astype(np.float32)


def keep(matrix):
    return matrix


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_columns_beyond_the_rank_of_a_layer_are_zero(init):
    a, b = random_pair(init, KEY, 10, 6, RANKS, (3,))
    assert a.shape == (3, 10, 4)
    assert b.shape == (3, 4, 6)
    for layer, rank in enumerate(RANKS):
        assert not np.any(a[layer, :, rank:])
        assert not np.any(b[layer, rank:])
        assert np.all(np.any(np.asarray(a[layer, :, :rank]), axis=0))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_product_is_zero_unless_it_is_asked_not_to_be(init):
    a, b = random_pair(init, KEY, 40, 30, (8,), ())
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)  # orthogonal: float32 sums of order 0.1
    a, b = random_pair(False, KEY, 40, 30, (8,), ())
    assert np.abs(a @ b).max() > 0.1


def test_gaussian_has_standard_deviation_one_over_r():
    a, _ = random_pair("gaussian", KEY, 4096, 4, (8,), ())
    assert np.std(a) == pytest.approx(1 / 8, rel=0.02)  # 32768 samples: 0.4 % expected


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_base_and_pair_add_up_to_the_weight(init, shape):
    matrix = weight(*shape)
    rest, (a, b) = split(init, matrix, 5, 0.5, keep, KEY)
    np.testing.assert_allclose(rest + 0.5 * a @ b, matrix, atol=1e-6)  # one float32 rounding
    assert a.shape == (shape[0], 5)
    assert b.shape == (5, shape[1])


def test_pissa_takes_the_largest_singular_values_and_shares_them_evenly():
    matrix = weight()
    rest, (a, b) = split("pissa", matrix, 3, 2.0, keep, KEY)
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(rest, compute_uv=False)[:-3], values[3:], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.sqrt(values[:3] / 2), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.sqrt(values[:3] / 2), rtol=1e-4)


def test_randomized_svd_comes_near_the_exact_one():
    matrix = weight()
    exact, _ = split("pissa", matrix, 4, 1.0, keep, KEY)
    near, _ = split("pissa_niter_4", matrix, 4, 1.0, keep, KEY)
    again, _ = split("pissa_niter_4", matrix, 4, 1.0, keep, KEY)
    np.testing.assert_allclose(near, exact, atol=1e-4)
    np.testing.assert_array_equal(near, again)


def test_olora_starts_orthonormal():
    _, (_, b) = split("olora", weight(), 5, 1.0, keep, KEY)
    np.testing.assert_allclose(b @ b.T, np.eye(5), atol=1e-5)


def errors(init, format, **options):
    matrix = weight()
    leaf, (a, b) = split(init, matrix, 4, 0.5, lambda m: quantize(m, format), KEY, **options)
    stored = np.asarray(materialize(quantize(matrix, format)))
    before = np.linalg.norm(stored - matrix)
    return np.linalg.norm(np.asarray(materialize(leaf)) + 0.5 * a @ b - matrix), before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_quantized_base_and_its_pair_are_nearer_to_the_weight(init, format):
    after, before = errors(init, format)
    # OLoRA does not take what is largest, so the rest is no easier to quantize.
    assert after < before * (1.1 if init == "olora" else 0.9)


def test_more_rounds_of_loftq_come_nearer():
    once, _ = errors("loftq", "nf4")
    often, _ = errors("loftq", "nf4", loftq_iter=5)
    assert often < once


def test_a_rank_beyond_the_matrix_takes_it_whole():
    rest, (a, b) = split("pissa", weight(6, 4), 8, 1.0, keep, KEY)
    np.testing.assert_allclose(rest, 0, atol=1e-6)
    assert a.shape == (6, 4)
    assert b.shape == (4, 4)


def test_weights_that_are_not_finite_are_refused():
    matrix = weight()
    matrix[3, 3] = np.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        split("pissa", matrix, 2, 1.0, keep, KEY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "pisa"}, 'Did you mean "pissa"'),
        ({"init": "pissa_niter_x"}, "is unknown"),
        ({"init": "orthogonal", "r": 3}, "even ranks"),
        ({"init": "orthogonal", "r": 4, "rank_pattern": {"q_proj": 3}}, "even ranks"),
    ],
)
def test_what_no_initializer_can_do_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**fields)


def test_only_splitting_changes_the_base():
    changing = [init for init in (True, False, "gaussian", "pissa", "pissa_niter_1", "olora",
                                  "loftq", "orthogonal") if changes_base(init)]  # fmt: skip
    assert changing == ["pissa", "pissa_niter_1", "olora", "loftq"]
