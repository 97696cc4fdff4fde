import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops.loss import chunked_cross_entropy

BATCH, LENGTH, DIM = 3, 17, 8


def problem(vocab, weights="fractional", seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((BATCH, LENGTH, DIM)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((DIM, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (BATCH, LENGTH)))
    weight = {
        "ones": np.ones((BATCH, LENGTH)),
        "zeros": np.zeros((BATCH, LENGTH)),
        "mask": rng.integers(0, 2, (BATCH, LENGTH)),
        "fractional": rng.uniform(0, 2, (BATCH, LENGTH)) * rng.integers(0, 2, (BATCH, LENGTH)),
    }[weights]
    return hidden, head, targets, jnp.asarray(weight, jnp.float32)


def dense(hidden, head, targets, weights):
    log_probabilities = jax.nn.log_softmax(hidden @ head)
    picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights)


def chunked(chunk_tokens):
    def loss(hidden, head, targets, weights):
        return chunked_cross_entropy(
            lambda h: h @ head, hidden, targets, weights, chunk_tokens=chunk_tokens
        )

    return loss


# 17 positions in chunks of 1, 5 (which does not divide 17), 17 and more; a chunk below the batch.
@pytest.mark.parametrize("chunk_tokens", [1, 3, 15, 51, 1024])
@pytest.mark.parametrize("vocab", [131, 1])
def test_chunked_loss_and_gradients_equal_the_dense_ones(vocab, chunk_tokens):
    inputs = problem(vocab)
    wanted, wanted_gradients = jax.value_and_grad(dense, argnums=(0, 1, 3))(*inputs)
    loss, gradients = jax.value_and_grad(chunked(chunk_tokens), argnums=(0, 1, 3))(*inputs)
    # float32 sums of 51 terms of size 5, in another order.
    np.testing.assert_allclose(loss, wanted, rtol=2e-6, atol=1e-6)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [3, 15, 1024])
def test_gradient_known_with_the_loss_is_the_one_computed_later(chunk_tokens):
    hidden, head, targets, weights = problem(131)

    def loss(hidden, head_trains):
        total = chunked_cross_entropy(
            lambda h: h @ head,
            hidden,
            targets,
            weights,
            chunk_tokens=chunk_tokens,
            head_trains=head_trains,
        )
        return 0.5 * total

    # Jitted, as a step is: then the head is a tracer that the function closes over.
    wanted, got = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(hidden, trains)
        for trains in (True, False)
    )
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
    assert np.abs(wanted[1]).max() > 0.1
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-5, atol=1e-6)


def test_gradient_known_with_the_loss_makes_logits_once():
    hidden, head, targets, weights = problem(131)

    def products(head_trains):
        def loss(hidden, head):
            return chunked_cross_entropy(
                lambda h: h @ head, hidden, targets, weights, head_trains=head_trains
            )

        return jax.jit(jax.value_and_grad(loss)).lower(hidden, head).as_text().count("dot_general")

    assert products(True) == 3  # the logits twice, and their gradient times the head
    assert products(False) == 2


@pytest.mark.parametrize("weights", ["ones", "mask", "zeros"])
def test_weights_pick_the_tokens_that_count(weights):
    inputs = problem(131, weights)
    np.testing.assert_allclose(chunked(15)(*inputs), dense(*inputs), rtol=2e-6)


def test_positions_of_weight_zero_change_nothing_whatever_their_target():
    hidden, head, targets, weights = problem(131, "mask")
    others = jnp.where(weights == 0, (targets + 7) % 131, targets)
    one = jax.value_and_grad(chunked(15), argnums=(0, 1))(hidden, head, targets, weights)
    other = jax.value_and_grad(chunked(15), argnums=(0, 1))(hidden, head, others, weights)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_loss_of_large_logits_stays_finite():
    hidden, head, targets, weights = problem(131, "ones")
    loss = chunked(15)(hidden * 1e4, head, targets, weights)
    assert np.isfinite(loss)


def float_sizes(jaxpr):
    """Yields the size of every float array inside a jaxpr, however deeply nested."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.floating):
                yield variable.aval.size
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr),
        ):
            if isinstance(inner, jax.extend.core.ClosedJaxpr):
                yield from float_sizes(inner.jaxpr)
            elif isinstance(inner, jax.extend.core.Jaxpr):
                yield from float_sizes(inner)


def largest_floats(loss, inputs):
    """Returns the elements of the largest float array in the traced and the compiled gradient."""
    gradient = jax.grad(loss, argnums=(0, 1))
    traced = max(float_sizes(jax.make_jaxpr(gradient)(*inputs).jaxpr))
    text = jax.jit(gradient).lower(*inputs).compile().as_text()
    shapes = re.findall(r"\b(?:f16|bf16|f32|f64)\[([\d,]+)\]", text)
    return traced, max(np.prod([int(d) for d in shape.split(",")]) for shape in shapes)


def test_logits_of_all_positions_never_exist():
    vocab = 1031
    inputs = problem(vocab)
    chunk = 5
    for largest in largest_floats(chunked(BATCH * chunk), inputs):
        assert largest == BATCH * chunk * vocab
    # The same look at the dense loss does see them.
    for largest in largest_floats(dense, inputs):
        assert largest >= BATCH * LENGTH * vocab
