"""Cross-entropy over a large vocabulary without ever holding all the logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def tokens_per_chunk(vocab_size: int, platform: str) -> int:
    """Returns how many tokens have their float32 logits in memory at once.

    256 MiB of them, on a CPU 64: no slower there (benchmarks/LOG.md).

    >>> tokens_per_chunk(32_000, "gpu"), tokens_per_chunk(32_000, "cpu")
    (1024, 512)
    """
    logits = 2**24 if platform == "cpu" else 2**26
    return max(64, min(1024, logits // vocab_size // 64 * 64))


def chunked_cross_entropy(
    logits_of: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk_tokens: int = 1024,
    parts: int = 1,
    head_trains: bool = True,
) -> Float[Array, ""]:
    """Returns the weighted SUM of token losses in nats; the caller divides by the sum of weights.

    Positions are cut into chunks of about `chunk_tokens` tokens (over the whole batch), so
    ``[B, T, V]`` never exists. A chunk's logits are recomputed in the backward pass; where nothing
    but `hidden` has a gradient, it is computed along with the loss instead, and kept.

    Args:
      logits_of: maps hidden states to float32 logits.
      hidden: last hidden states.
      targets: token ids to predict; any valid id where the weight is 0.
      weights: 1.0 where the target counts, else 0.0.
      chunk_tokens: tokens per chunk, >= 1.
      parts: into how many runs the tokens of a row are split over devices; a chunk then has a share
        of each, so that all of them work on all chunks.
      head_trains: whether `logits_of` depends on anything that trains.
    """
    batch, length, _ = hidden.shape
    parts = parts if length % parts == 0 else 1
    run = length // parts
    chunk = min(run, max(1, chunk_tokens // (batch * parts)))
    num_chunks = -(-run // chunk)
    padding = num_chunks * chunk - run

    def cut(x):  # [B, T, ...] -> [chunks, B, parts, C, ...]: what is sharded stays where it is
        x = x.reshape(batch, parts, run, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(batch, parts, num_chunks, chunk, *x.shape[3:]), 2, 0)

    def loss_of(hidden_chunk, target, weight):
        logits = logits_of(hidden_chunk)
        # Compared, not gathered: the gradient of a gather is a scatter into one more array of
        # logits (on a TPU half of the memory that a chunk takes).
        column = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1)
        picked = jnp.sum(jnp.where(column == target[..., None], logits, 0), axis=-1)
        token_loss = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.sum(token_loss * weight)

    if not head_trains:
        return _with_gradient(loss_of, cut, hidden, (cut(targets), cut(weights)))

    @jax.checkpoint
    def add_chunk(total, chunk_of):
        return total + loss_of(*chunk_of), None

    chunks = (cut(hidden), cut(targets), cut(weights))
    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)[0]


def _with_gradient(loss_of, cut, hidden, labels) -> Float[Array, ""]:
    """The sum of ``loss_of(chunk, *label chunks)`` whose gradient is known once it is computed."""
    zero = jnp.zeros((), jnp.float32)

    @jax.custom_vjp
    def total(hidden):
        def add_chunk(sum_so_far, chunk_of):
            return sum_so_far + loss_of(*chunk_of), None

        return jax.lax.scan(add_chunk, zero, (cut(hidden), *labels))[0]

    def forward(hidden):
        chunks, whole = jax.vjp(cut, hidden)

        def add_chunk(sum_so_far, chunk_of):
            loss, gradient = jax.value_and_grad(loss_of)(*chunk_of)
            return sum_so_far + loss, gradient

        loss, gradients = jax.lax.scan(add_chunk, zero, (chunks, *labels))
        return loss, whole(gradients)[0]

    def backward(gradient, dloss):
        return ((gradient * dloss).astype(gradient.dtype),)

    total.defvjp(forward, backward)
    return total(hidden)
