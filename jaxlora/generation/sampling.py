"""From logits to the next token: pure functions, the filters in transformers' order."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlora.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and how many.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy) and ignores the filters.
      top_k: keeps the k likeliest tokens; 0 keeps all.
      top_p: keeps the likeliest tokens that together reach this probability; 1 keeps all.
      min_p: keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
      repetition_penalty: makes tokens already in the row less likely (CTRL, Keskar et al. 2019);
        1 leaves them alone, greedy decoding included.
      max_new_tokens: longest answer.
      seed: the same seed and prompt give the same answer.

    Raises:
      UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self):
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
        ):
            if not ok:
                value = getattr(self, name)
                raise UserError(f"{name}: {value} is out of range; expected {expected}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    options: SamplingOptions,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """Returns the next token of each row.

    Args:
      logits: float32 next-token logits.
      keys: one typed PRNG key per row, so that a row's tokens do not depend on its neighbours.
      options: temperature and filters.
      seen: tokens already in each row, for the repetition penalty.

    >>> logits = jnp.array([[0.0, 3.0, 1.0]])
    >>> sample(logits, jax.random.split(jax.random.key(0), 1), SamplingOptions()).tolist()
    [1]
    """
    if seen is not None:
        logits = penalise(logits, seen, options.repetition_penalty)
    if options.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jax.vmap(jax.random.categorical)(keys, filtered(logits, options))
    return tokens.astype(jnp.int32)


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Returns logits with those of seen tokens moved down (a penalty below 1 moves them up)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Returns logits divided by the temperature, minus infinity where a filter drops the token.

    >>> filtered(jnp.array([[0.0, 3.0, 1.0]]), SamplingOptions(temperature=2, top_k=2)).tolist()
    [[-inf, 1.5, 0.5]]
    """
    logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, options.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if options.top_p < 1:
        logits = jnp.where(logits < _nucleus_border(logits, options.top_p), -jnp.inf, logits)
    if options.min_p > 0:
        # p >= min_p * max(p), written for logits: no softmax needed.
        border = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(options.min_p)
        logits = jnp.where(logits < border, -jnp.inf, logits)
    return logits


def _nucleus_border(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """The smallest logit in the nucleus (Holtzman et al. 2020); the likeliest is always in it."""
    falling = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (before < top_p).at[:, 0].set(True)
    return jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
