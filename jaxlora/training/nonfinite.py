"""Losses and gradients that are not finite: the step has changed nothing; stop, or go on."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

from jaxlora.core.errors import UserError


class NonFiniteError(UserError):
    """A run stopped by a loss or a gradient that is not finite."""

    exit_code = 3


def is_finite(values: Mapping[str, float]) -> bool:
    """Whether a step could be applied.

    >>> is_finite({"loss": 1.0, "grad_norm": float("inf")})
    False
    """
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Steps left out because they were not finite.

    Attributes:
      total: of the whole run; the learning rate's schedule is behind by as many.
      in_a_row: the last ones.
    """

    total: int = 0
    in_a_row: int = 0

    def another(self) -> "Skipped":
        """The count after one more."""
        return Skipped(self.total + 1, self.in_a_row + 1)

    def ended(self) -> "Skipped":
        """The count after a step that was finite."""
        return Skipped(self.total, 0) if self.in_a_row else self


def skip_or_stop(
    policy: Literal["stop", "skip"],
    limit: int,
    skipped: Skipped,
    step: int,
    values: Mapping[str, float],
    rows: Callable[[], str],
) -> str:
    """Returns what to say of a step that is left out, or raises.

    Args:
      policy, limit: `nonfinite` and `nonfinite_limit`.
      skipped: with this step.
      step: its number, from 1.
      values: its loss and gradient norm.
      rows: says which rows it was made of.

    Raises:
      NonFiniteError: the run is to stop.
    """
    what = (
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite, the "
        f"update was not applied; rows {rows()}"
    )
    if policy == "stop":
        raise NonFiniteError(
            f"{what}. Look at these rows; resume_from_checkpoint: true continues, with nonfinite: "
            "skip past them. Where every step fails, start anew with a lower learning_rate."
        )
    if skipped.in_a_row > limit:
        raise NonFiniteError(
            f"{what}. {skipped.in_a_row} steps in a row, more than nonfinite_limit {limit}: start "
            "anew with a lower learning_rate, or look at the weights and the data."
        )
    return f"{what}; skipped ({skipped.in_a_row} in a row, {skipped.total} in all)"
