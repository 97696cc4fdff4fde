"""Optimizers by name: thin rows over optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers, muon

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.optim.blockwise import scale_by_blockwise_adam

Mask = Any  # a tree of bools shaped like the trainable tree


def _adamw(schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype):
    b1, b2 = betas
    return optax.adamw(
        schedule, b1, b2, eps, weight_decay=weight_decay, mask=decayed, mu_dtype=mu_dtype
    )


def _adamw_8bit(schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype):
    b1, b2 = betas
    return optax.chain(
        scale_by_blockwise_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _adafactor(schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype):
    # optax's own decay is not times the learning rate: 0.01 would halve the weights in 70 steps.
    return optax.chain(
        # The learning rate is absolute, as for the others.
        optax.adafactor(None, multiply_by_parameter_scale=False),
        optax.add_decayed_weights(-weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule, flip_sign=False),
    )


def _lion(schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype):
    b1, b2 = betas
    return optax.lion(schedule, b1, b2, mu_dtype, weight_decay=weight_decay, mask=decayed)


def _sgd(schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype):
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=decayed), optax.sgd(schedule))


def _muon(schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype):
    # Leaves are [in, out] or stacked [L, in, out]; the last two axes are the matrix.
    dims = jax.tree.map(
        lambda is_matrix: MuonDimensionNumbers((-2,), (-1,)) if is_matrix else None, matrices
    )
    b1, b2 = betas
    return muon(
        schedule,
        weight_decay=weight_decay,
        weight_decay_mask=decayed,
        mu_dtype=mu_dtype,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        muon_weight_dimension_numbers=dims,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
    "muon": _muon,
}


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    decayed: Mask,
    matrices: Mask,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None = 1.0,
    rates: Any = None,
    mu_dtype: DTypeLike = "float32",
) -> optax.GradientTransformation:
    """Returns the named optimizer behind clipping by the global gradient norm.

    Args:
      name: a key of `OPTIMIZERS`.
      schedule: learning rate by step.
      decayed: which leaves weight decay applies to.
      matrices: which leaves Muon orthogonalizes; the others get Adam.
      weight_decay: decoupled decay (Loshchilov and Hutter 2019), times the learning rate.
      betas, eps: Adam's and Lion's.
      max_grad_norm: None or 0 switches clipping off.
      rates: multiple of the schedule's learning rate for each leaf; None: the same for all.
      mu_dtype: of the gradient's mean between steps, in adamw, lion and muon. The mean of its
        squares is float32: bfloat16 cannot lose a thousandth of a value, as it must each step.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"optimizer: {name!r} is unknown; expected {', '.join(OPTIMIZERS)}."
            f"{did_you_mean(name, OPTIMIZERS)}"
        )
    optimizer = OPTIMIZERS[name](schedule, weight_decay, betas, eps, decayed, matrices, mu_dtype)
    if rates is not None:
        optimizer = optax.chain(optimizer, _scale_by_leaf(rates))
    if not max_grad_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def _scale_by_leaf(rates: Any) -> optax.GradientTransformation:
    """Multiplies each leaf's update, decay included: all of them are linear in the rate."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda rate, update: rate * update, rates, updates)
    )
