"""One jitted, donated step for full fine-tuning, LoRA and QLoRA.

A method is which leaves train and how the frozen ones are stored. Both are in the trees, so the
step has no branch on the method: `trainable` is ``{"params": {path: array}, "adapter": {...}}`` and
`frozen` is ``{path: leaf}``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlora import lora
from jaxlora.core.tree import Tree, unflatten
from jaxlora.lora import Target
from jaxlora.lora.parts import fill
from jaxlora.models.transformer import Transformer, bind
from jaxlora.ops.loss import chunked_cross_entropy, tokens_per_chunk
from jaxlora.parallel.head import SplitHead
from jaxlora.parallel.mesh import batch_shards
from jaxlora.training.gathering import gathered_pairs

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def weights(
    trainable: Tree,
    frozen: Tree,
    targets: Mapping[str, Target],
    key: jax.Array | None = None,
    gathered: Mapping[str, Any] | None = None,
) -> Tree:
    """Returns the parameter tree a transformer binds: trained leaves in place, LoRA on top.

    Args:
      trainable: what trains.
      frozen: ``{path: leaf}`` of what does not, with a hole where a part of a leaf trains.
      targets: of the adapter.
      key: dropout key of this forward pass; None in evaluation.
      gathered: `LoraArray.gathered` of the pairs that have one.
    """
    own = {path: fill(frozen.get(path), value) for path, value in trainable["params"].items()}
    return lora.apply(unflatten({**frozen, **own}), trainable["adapter"], targets, key, gathered)


def _read(transformer: Transformer, params: Tree, batch: Batch, head: SplitHead) -> tuple[Any, ...]:
    """``(model, hidden, targets, weights)``: what the head reads, and what it should say to it."""
    model = bind(transformer, head.weights(params))
    segments = batch["segment_ids"]
    hidden, _ = model(batch["tokens"], batch["positions"], segments, types=batch.get("token_types"))
    targets, weights = batch["targets"], batch["weights"]
    if transformer.cfg.num_labels:  # a text has one target, which stands at its first token
        hidden = model.pooled(hidden, segments)[:, None]
        targets, weights = targets[:, :1], weights[:, :1]
    return model, hidden, targets, weights


def batch_loss(
    transformer: Transformer,
    params: Tree,
    batch: Batch,
    *,
    head_trains: bool = True,
    placed: Tree | None = None,
) -> Float[Array, ""]:
    """Returns the sum of the weighted losses in nats of a ``[rows, T]`` batch.

    A loss for each token, or in a classifier for each row.

    Args:
      transformer: unbound transformer.
      params: what it binds.
      batch: of rows.
      head_trains: whether anything between the last hidden states and the logits trains.
      placed: shardings of what trains, whose devices share the rows: each has chunks of its own.
    """
    head = SplitHead(_mesh(placed), transformer.cfg)
    read = _read(transformer, params, batch, head)
    chunk = tokens_per_chunk(transformer.cfg.vocab_size, _platform(placed))
    return _loss(transformer, head, chunk, *read, head_trains=head_trains)


def _loss(
    transformer: Transformer,
    head: SplitHead,
    chunk: int,
    model,
    hidden,
    targets,
    weights,
    *,
    head_trains: bool,
) -> Float[Array, ""]:
    row_shards = 1 if head.mesh is None else batch_shards(head.mesh)
    return chunked_cross_entropy(
        lambda hidden: head.logits(model.logits(head.rows(hidden))),
        hidden,
        targets,
        weights,
        # What is gathered for a chunk is gathered once for all devices: it has a share of each.
        chunk_tokens=chunk * row_shards * transformer.context,
        parts=transformer.context,
        head_trains=head_trains,
    )


def _mesh(placed: Tree | None) -> Any:
    """The devices that share the rows of a batch, by where what trains lies; None for one."""
    return getattr(next(iter(jax.tree.leaves(placed)), None), "mesh", None)


def _platform(placed: Tree | None) -> str:
    first = next(iter(jax.tree.leaves(placed)), None)
    return jax.default_backend() if first is None else next(iter(first.device_set)).platform


def trains_head(transformer: Transformer, trainable: Tree) -> bool:
    """Returns whether anything between the last hidden states and the logits trains."""
    parts = ("lm_head/", "classifier/", "head_transform/")
    parts += ("embed/",) if transformer.cfg.tie_embedding else ()
    return any(path.startswith(parts) for path in (*trainable["params"], *trainable["adapter"]))


def make_train_step(
    transformer: Transformer,
    targets: Mapping[str, Target],
    optimizer: optax.GradientTransformation,
    seed_key: jax.Array,
    like: tuple[Tree, Any],
) -> Callable[..., tuple[Tree, Any, Metrics]]:
    """Returns ``step(trainable, opt_state, frozen, batch, number)``, jitted, its state donated.

    The batch is ``[accumulation, rows, T]``. Loss and gradient sums of the micro-batches are added
    up and divided once by the number of trained tokens, so neither depends on how the batch was
    cut. If the loss or the gradient is not finite the state comes back unchanged.

    Args:
      transformer: unbound transformer.
      targets: of the adapter.
      optimizer: from `jaxlora.optim.optimizers`.
      seed_key: typed PRNG key; step and micro-batch numbers are folded into it.
      like: ``(trainable, opt_state)`` as they will come in; they go out placed the same way, so
        that the second step does not compile anew.
    """
    placed = jax.tree.map(lambda x: x.sharding, like)
    gathered = gathered_pairs(placed[0]["adapter"], targets)
    head_trains = trains_head(transformer, like[0])

    def step(trainable, opt_state, frozen, batch: Batch, number: Int[Array, ""]):
        step_key = jax.random.fold_in(seed_key, number)

        def loss_of(trainable, micro_batch, key):
            params = weights(trainable, frozen, targets, key, gathered)
            return batch_loss(
                transformer, params, micro_batch, head_trains=head_trains, placed=placed
            )

        def add_micro_batch(sums, inputs):
            micro_batch, index = inputs
            micro = jax.value_and_grad(loss_of)(
                trainable, micro_batch, jax.random.fold_in(step_key, index)
            )
            return jax.tree.map(jnp.add, sums, micro), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
        numbers = jnp.arange(batch["tokens"].shape[0])
        (loss_sum, gradient_sum), _ = jax.lax.scan(add_micro_batch, zeros, (batch, numbers))
        # A small batch of masked text may hide nothing: then nothing is learned from it.
        tokens = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        loss = loss_sum / tokens
        gradient = jax.tree.map(lambda g: g / tokens, gradient_sum)
        norm = optax.global_norm(gradient)
        updates, new_opt_state = optimizer.update(gradient, opt_state, trainable)
        updated = optax.apply_updates(trainable, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        trainable, opt_state = jax.tree.map(keep, (updated, new_opt_state), (trainable, opt_state))
        return trainable, opt_state, {"loss": loss, "grad_norm": norm, "trained_tokens": tokens}

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*placed, None))


def make_eval_step(
    transformer: Transformer, targets: Mapping[str, Target], like: Tree | None = None
) -> Callable[..., Any]:
    """Returns ``step(trainable, frozen, batch) -> (loss sum, trained tokens, confusion)``.

    Without dropout. The confusion of a classifier counts texts, ``[label, most likely label]``;
    that of a model of tokens is empty.

    Args:
      transformer: unbound transformer.
      targets: of the adapter.
      like: `trainable` as it will come in; None leaves to the compiler how a split pair is used.
    """
    labels = transformer.cfg.num_labels
    placed = jax.tree.map(lambda x: x.sharding, {"adapter": {}} if like is None else like)
    gathered = gathered_pairs(placed["adapter"], targets)
    head = SplitHead(_mesh(placed), transformer.cfg)
    chunk = tokens_per_chunk(transformer.cfg.vocab_size, _platform(placed))

    @jax.jit
    def step(trainable, frozen, batch: Batch):
        params = weights(trainable, frozen, targets, gathered=gathered)

        def add_micro_batch(sums, micro_batch):
            read = model, hidden, wanted, counted = _read(transformer, params, micro_batch, head)
            loss, confusion = sums
            if labels:
                said = jnp.argmax(model.logits(hidden), axis=-1)
                confusion = confusion.at[wanted, said].add(counted)
            more = _loss(transformer, head, chunk, *read, head_trains=True)
            return (loss + more, confusion), None

        zeros = (jnp.zeros((), jnp.float32), jnp.zeros((labels, labels), jnp.float32))
        (total, confusion), _ = jax.lax.scan(add_micro_batch, zeros, batch)
        return total, jnp.sum(batch["weights"]), confusion

    return step
