"""Mixtures of experts: which experts a token goes to, and a matmul with a matrix for each expert.

Tokens are sorted by expert, so that every expert's are one run of rows and no token is dropped.
Shapes: M rows (tokens), K experts chosen by each, E experts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora.ops.arrays import LoraArray, PatchedArray, QuantizedArray, Weight
from jaxlora.ops.quantize import dequantize


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a token's router logits become experts and their weights.

    Attributes:
      top_k: experts K that a token goes to.
      scoring: what is compared: ``softmax`` or ``sigmoid`` of the logits, or the logits as they are
        (``chosen_softmax``: the chosen ones' softmax are the weights).
      renormalize: whether the weights are divided by their sum.
      scale: multiplies the weights.
      groups: groups that the experts are divided into, in order.
      top_groups: groups that a token may choose from.
      group_best: a group counts as much as the sum of its so many best scores.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1


_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "chosen_softmax": lambda logits: logits,
}


def route(
    logits: Float[Array, "*M E"], routing: Routing, correction: Float[Array, "E"] | None = None
) -> tuple[Float[Array, "*M K"], Int[Array, "*M K"]]:
    """Returns weight and number of the experts each token goes to.

    Args:
      logits: of the router, float32.
      routing: the rule.
      correction: added to the scores for the choice, not in the weights.

    >>> weights, experts = route(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), Routing(2))
    >>> experts.tolist(), [round(float(weight), 3) for weight in weights[0]]
    ([[1, 2]], [0.6, 0.3])
    """
    scores = _SCORES[routing.scoring](logits)
    choice = jax.lax.stop_gradient(scores if correction is None else scores + correction)
    if routing.top_groups < routing.groups:
        choice = _within_best_groups(choice, routing)
    experts = jax.lax.top_k(choice, routing.top_k)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if routing.scoring == "chosen_softmax":
        weights = jax.nn.softmax(weights)
    if routing.renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights * routing.scale, experts


def _within_best_groups(choice: Float[Array, "*M E"], routing: Routing) -> Float[Array, "*M E"]:
    """Scores with those of all but the best groups made too small to be chosen."""
    grouped = choice.reshape(*choice.shape[:-1], routing.groups, -1)
    worth = jax.lax.top_k(grouped, routing.group_best)[0].sum(axis=-1)
    best = jax.lax.top_k(worth, routing.top_groups)[1]
    open_ = jax.nn.one_hot(best, routing.groups, dtype=bool).any(axis=-2)
    return jnp.where(open_[..., None], grouped, -jnp.inf).reshape(choice.shape)


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Rows in the order of their experts, and back; K copies of each.

    Attributes:
      order: for each place in that order, ``token * K + choice``.
      sizes: how many rows each expert has.
      experts: for each place, its expert.
      partial: whether some go to experts that are not here.
    """

    order: Int[Array, "MK"]
    sizes: Int[Array, "E"]
    experts: Int[Array, "MK"]
    top_k: int
    partial: bool = False

    @classmethod
    def to(
        cls, experts: Int[Array, "M K"], num_experts: int, first: Int[Array, ""] | None = None
    ) -> "Dispatch":
        """Returns the order of tokens that go to `num_experts` experts.

        Args:
          experts: where each token goes.
          num_experts: how many are here.
          first: number of the first that is here; None where all are. What goes to others comes
            last, belongs to no run and is 0 on the way there and back.
        """
        flat = experts.reshape(-1)
        if first is not None:
            here = (flat >= first) & (flat < first + num_experts)
            flat = jnp.where(here, flat - first, num_experts)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
        return cls(order, sizes, flat[order], experts.shape[1], first is not None)

    def spread(self, x: Float[Array, "M D"]) -> Float[Array, "MK D"]:
        """Returns every token's row at each of its experts."""
        copies = jnp.broadcast_to(x[:, None], (len(x), self.top_k, x.shape[-1]))
        return self._here(_permuted(copies.reshape(-1, x.shape[-1]), self.order))

    def gather(self, y: Float[Array, "MK O"], weights: Float[Array, "M K"]) -> Float[Array, "M O"]:
        """Returns every token's sum over its experts, weighted."""
        back = _permuted(self._here(y), jnp.argsort(self.order))
        back = back.reshape(*weights.shape, y.shape[-1])
        return jnp.einsum("MKO,MK->MO", back, weights.astype(y.dtype))

    def _here(self, x: Float[Array, "MK D"]) -> Float[Array, "MK D"]:
        if not self.partial:
            return x
        # In both directions: what a grouped matmul makes of rows beyond the last run is undefined.
        return jnp.where((self.experts < len(self.sizes))[:, None], x, 0)


def _permuted(x: Float[Array, "M D"], order: Int[Array, "M"]) -> Float[Array, "M D"]:
    # Told that no row comes twice, the gradient adds nothing up: it is the same in every run.
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def grouped_matmul(
    x: Float[Array, "M I"], weight: Weight, sizes: Int[Array, "E"]
) -> Float[Array, "M O"]:
    """Returns each row times the matrix of its expert; rows come sorted by expert.

    Gradients go where those of `jaxlora.ops.matmul.matmul` go.

    Args:
      x: rows.
      weight: any leaf ``[E, I, O]``; a LoRA pair ``[E, I, R]``, ``[E, R, O]`` with a scale ``[E]``.
      sizes: rows of each expert; they sum to M.

    >>> x, weight = jnp.ones((3, 2)), jnp.arange(2.0)[:, None, None] * jnp.ones((2, 2, 1))
    >>> grouped_matmul(x, weight, jnp.array([1, 2])).ravel().tolist()
    [0.0, 2.0, 2.0]
    """
    if isinstance(weight, LoraArray):
        assert weight.magnitude is None, "DoRA on experts"
        assert weight.key is None, "dropout on experts"
        b = weight.b * weight.scale[:, None, None]
        low_rank = grouped_matmul(grouped_matmul(x, weight.a, sizes), b, sizes)
        return grouped_matmul(x, weight.base, sizes) + low_rank
    if isinstance(weight, QuantizedArray):
        return _quantized_matmul(x, weight, sizes)
    assert not isinstance(weight, PatchedArray), "part of the experts"
    return jax.lax.ragged_dot(x, weight.astype(x.dtype), sizes)


@jax.custom_vjp
def _quantized_matmul(x, weight, sizes):
    return jax.lax.ragged_dot(x, dequantize(weight, x.dtype), sizes)


def _quantized_forward(x, weight, sizes):
    # As for one matrix (`jaxlora.ops.matmul`): only the packed experts are kept for the gradient.
    return _quantized_matmul(x, weight, sizes), (weight, sizes)


def _quantized_backward(residuals, dy):
    weight, sizes = residuals
    matrices = jnp.swapaxes(dequantize(weight, dy.dtype), -1, -2)
    return jax.lax.ragged_dot(dy, matrices, sizes), None, None


_quantized_matmul.defvjp(_quantized_forward, _quantized_backward)
