import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.ops.arrays import LoraArray, QuantizedArray
from jaxlora.ops.experts import Dispatch, Routing, grouped_matmul, route
from jaxlora.ops.matmul import materialize
from jaxlora.ops.quantize import FORMATS, quantize

EXPERTS, IN, OUT, RANK, TOKENS = 5, 32, 12, 3, 17
LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS, 12)), jnp.float32)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def leaf(kind, *, lora=False):
    weight = normal(EXPERTS, IN, OUT, seed=1)
    if kind != "float32":
        each = [quantize(matrix, kind) for matrix in np.asarray(weight)]
        weight = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    if not lora:
        return weight
    a, b = 0.2 * normal(EXPERTS, IN, RANK, seed=2), 0.2 * normal(EXPERTS, RANK, OUT, seed=3)
    return LoraArray(weight, a, b, scale=jnp.full(EXPERTS, 1.7))


def dispatch():
    chosen = jnp.asarray(np.random.default_rng(3).integers(0, EXPERTS - 1, (TOKENS, 2)))
    return chosen, Dispatch.to(chosen, EXPERTS)  # the last expert gets nothing


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["float32", *FORMATS])
def test_grouped_matmul_and_its_gradients_are_those_of_each_row_alone(kind, lora):
    weight, (chosen, to) = leaf(kind, lora=lora), dispatch()
    x = normal(TOKENS, IN, seed=4)
    mixed = normal(TOKENS, 2, seed=5)
    pair = {"a": weight.a, "b": weight.b} if lora else {}

    def with_pair(pair):
        return LoraArray(weight.base, pair["a"], pair["b"], weight.scale) if lora else weight

    def grouped(x, pair):
        return to.gather(grouped_matmul(to.spread(x), with_pair(pair), to.sizes), mixed)

    def one_by_one(x, pair):
        matrices = materialize(with_pair(pair))[chosen]
        return jnp.einsum("MI,MKIO,MK->MO", x, matrices, mixed)

    dy = normal(TOKENS, OUT, seed=6)
    results = []
    for f in (grouped, one_by_one):
        y, back = jax.vjp(f, x, pair)
        results.append((y, back(dy)))
    # float32 sums of 32 products, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_experts_leave_only_their_packed_values_for_the_gradient(kind):
    weight, (_, to) = leaf(kind), dispatch()
    assert isinstance(weight, QuantizedArray)
    _, back = jax.vjp(lambda x: grouped_matmul(x, weight, to.sizes), normal(2 * TOKENS, IN))
    kept = sum(part.nbytes for part in jax.tree.leaves(back))
    assert kept <= sum(part.nbytes for part in jax.tree.leaves(weight)) + to.sizes.nbytes


def test_rows_of_the_same_token_meet_again():
    chosen, to = dispatch()
    x, weights = normal(TOKENS, IN), normal(TOKENS, 2, seed=1)
    back = to.gather(to.spread(x), weights)
    # float32, a sum of two.
    np.testing.assert_allclose(back, x * weights.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-5)
    assert (np.diff(to.experts) >= 0).all()
    np.testing.assert_array_equal(np.bincount(chosen.ravel(), minlength=EXPERTS), to.sizes)


def test_softmax_routing_takes_the_likeliest():
    weights, experts = route(LOGITS, Routing(3))
    probabilities = np.asarray(jax.nn.softmax(LOGITS))
    np.testing.assert_array_equal(experts, np.argsort(-probabilities)[:, :3])
    np.testing.assert_array_equal(weights, np.take_along_axis(probabilities, experts, 1))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_renormalized_weights_sum_to_the_scale(scoring):
    weights, _ = route(LOGITS, Routing(3, scoring, renormalize=True, scale=2.5))
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=1e-6)


def test_chosen_softmax_is_over_the_chosen_only():
    weights, experts = route(LOGITS, Routing(3, "chosen_softmax"))
    chosen = np.take_along_axis(np.asarray(LOGITS), experts, 1)
    np.testing.assert_allclose(weights, jax.nn.softmax(chosen), rtol=1e-6)


@pytest.mark.parametrize("best", [1, 2])
def test_no_expert_of_another_group_is_chosen(best):
    routing = Routing(4, groups=4, top_groups=2, group_best=best)
    _, experts = route(LOGITS, routing)
    scores = np.asarray(jax.nn.softmax(LOGITS)).reshape(TOKENS, 4, 3)
    worth = np.sort(scores)[..., -best:].sum(axis=-1)
    allowed = np.argsort(-worth)[:, :2]
    for row, groups in zip(np.asarray(experts), allowed, strict=True):
        assert set(row // 3) <= set(groups)


def test_a_correction_moves_the_choice_and_not_the_weight():
    correction = jnp.zeros(12).at[7].set(10.0)
    weights, experts = route(LOGITS, Routing(2, "sigmoid"), correction)
    assert (experts[:, 0] == 7).all()
    np.testing.assert_array_equal(weights[:, 0], jax.nn.sigmoid(LOGITS[:, 7]))
