import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.generation.sampling import SamplingOptions, filtered, penalise, sample

LOGITS = jnp.log(jnp.array([0.4, 0.05, 0.3, 0.2, 0.05]))


def draw(options, count=4000):
    keys = jax.random.split(jax.random.key(1), count)
    tokens = sample(jnp.tile(LOGITS, (count, 1)), keys, options)
    return np.bincount(np.asarray(tokens), minlength=5) / count


def kept(options):
    return np.flatnonzero(np.isfinite(filtered(LOGITS[None], options)[0])).tolist()


def test_temperature_zero_takes_the_likeliest():
    assert draw(SamplingOptions())[0] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature):
    wanted = jax.nn.softmax(LOGITS / temperature)
    # 4000 draws: one standard deviation is at most 0.008.
    np.testing.assert_allclose(
        draw(SamplingOptions(temperature=temperature)), wanted, atol=4 * 0.008
    )


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.65}, [0, 2]),
        ({"top_p": 0.75}, [0, 2, 3]),
        ({"top_p": 1e-6}, [0]),
        ({"min_p": 0.45}, [0, 2, 3]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 2, "top_p": 0.5}, [0]),  # 0.4 / 0.7 of what top_k leaves
    ],
)
def test_a_filter_keeps_exactly_its_tokens(options, tokens):
    options = SamplingOptions(temperature=1.0, **options)
    assert kept(options) == tokens
    assert np.flatnonzero(draw(options, 500)).tolist() == tokens


def test_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_a_row_of_its_own_key_is_drawn_alike_among_any_rows():
    options, keys = SamplingOptions(temperature=1.0), jax.random.split(jax.random.key(2), 8)
    together = sample(jnp.tile(LOGITS, (8, 1)), keys, options).tolist()
    alone = [sample(LOGITS[None], keys[i : i + 1], options).item() for i in range(8)]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option):
    with pytest.raises(UserError, match=rf"^{next(iter(option))}: .*; expected .*\.$"):
        SamplingOptions(**option)
