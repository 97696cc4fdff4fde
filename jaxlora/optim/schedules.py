"""Learning-rate schedules, step for step those of transformers' Trainer."""

import jax.numpy as jnp
import optax

from jaxlora.core.errors import UserError, did_you_mean

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def make_schedule(
    name: str,
    peak: float,
    *,
    total_steps: int,
    warmup_steps: int,
    min_ratio: float = 0.0,
    decay_steps: int | None = None,
    quadratic_warmup: bool = False,
) -> optax.Schedule:
    """Returns the learning rate as a function of the optimizer step, from 0.

    A linear warm-up from 0 comes first; the rest goes from `peak` to ``min_ratio * peak``.

    Args:
      name: one of `SCHEDULES`.
      peak: highest learning rate.
      total_steps: steps of the run, >= 1.
      warmup_steps: steps before the peak, >= 0.
      min_ratio: floor as a share of the peak (cosine and linear).
      decay_steps: step at which the floor is reached and kept; None: the last.
      quadratic_warmup: squares the share of the warm-up, as Axolotl's lr_quadratic_warmup.

    >>> rate = make_schedule("cosine", 1.0, total_steps=10, warmup_steps=2)
    >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if name not in SCHEDULES:
        raise UserError(
            f"lr_scheduler: {name!r} is unknown; expected {', '.join(SCHEDULES)}."
            f"{did_you_mean(name, SCHEDULES)}"
        )
    if name == "constant":
        warmup_steps = 0

    falling = max(1, (total_steps if decay_steps is None else decay_steps) - warmup_steps)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / falling, 0.0, 1.0)
        if name == "cosine":
            share = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif name == "linear":
            share = 1.0 - progress
        else:
            share = jnp.ones_like(progress)
        share = min_ratio + (1.0 - min_ratio) * share
        ramp = (step / max(1, warmup_steps)) ** (2 if quadratic_warmup else 1)
        return peak * jnp.where(step < warmup_steps, ramp, share)

    return rate
