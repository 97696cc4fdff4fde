"""Decoding with a key-value cache: whole batches in one compiled loop, or one token at a time.

Rows are padded on the left, so that all write the same cache slot; padding is segment 0, which
nothing attends to, and positions count from the first real token. Lengths are rounded up
(`bucket`), so that a few shapes compile. Weights are arguments of the compiled functions: any
leaves `bind` accepts (plain, quantized, LoRA) decode as they are.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlora.core.errors import UserError
from jaxlora.generation.sampling import SamplingOptions, sample
from jaxlora.models.config import ModelConfig
from jaxlora.models.moe import Spread
from jaxlora.models.stacks import is_apart
from jaxlora.models.transformer import Cache, Constrain, Transformer, bind, empty_cache

Params = Mapping[str, Any]
# Batches of one call are padded to its longest prompt up to here: reading so little padding takes
# less than compiling for one more width.
_ONE_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What the compiled code depends on besides shapes; equal recipes share one compilation."""

    cfg: ModelConfig
    dtype: np.dtype
    constrain: Constrain
    spread: Spread
    options: SamplingOptions

    def bound(self, params: Params) -> Transformer:
        hooks = {"constrain": self.constrain, "spread": self.spread}
        return bind(Transformer(self.cfg, dtype=self.dtype, **hooks), params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """A batch between two tokens.

    Attributes:
      token: last sampled, not yet seen by the model.
      positions: where `token` stands in its sequence.
      seen: tokens of prompt and answer so far; None without a repetition penalty.
      keys: one PRNG key per row, the same for the whole answer.
      step: tokens sampled so far, less one.
    """

    cache: Cache
    token: Int[Array, "B"]
    positions: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    keys: Key[Array, "B"]
    step: Int[Array, ""]


def generate(
    transformer: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    eos_ids: Collection[int] = (),
    pad_id: int = 0,
    *,
    batch_size: int = 8,
    between: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Returns the answer to each prompt as token ids, without the end token that stopped it.

    An answer also stops at `options.max_new_tokens` and where the model's context is full. It does
    not depend on the other prompts (to floating-point rounding) nor on `batch_size`.

    Args:
      transformer: its config, dtype and `constrain` are used.
      params: tree that `bind` accepts; sharded trees decode where they are.
      prompts: token ids, begin token included, at least one each.
      eos_ids: tokens that end an answer.
      pad_id: any valid id, for empty places.
      batch_size: prompts decoded at a time.
      between: called before each batch.

    Raises:
      UserError: a prompt is empty, leaves no room in the context, or has an id out of range.
    """
    cfg, answers = transformer.cfg, [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        _check(prompt, cfg, f"prompt {number + 1}")
    recipe = _recipe(transformer, options)
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    rows = min(batch_size, len(prompts))
    least = min(max(map(len, prompts), default=0), _ONE_WIDTH)
    for start in range(0, len(prompts), max(rows, 1)):
        between()
        numbers = by_length[start : start + rows]
        tokens, lengths = _left_padded([prompts[n] for n in numbers], rows, pad_id, least)
        budgets = np.zeros(rows, np.int32)  # 0 for the empty rows of a short last batch
        budgets[: len(numbers)] = _budgets(lengths[: len(numbers)], options, cfg)
        keys = _row_keys(options.seed, [*numbers, *[0] * (rows - len(numbers))])
        size = bucket(int(budgets.max()))
        found, counts = _decode_batch(
            params, tokens, lengths, keys, budgets, _as_array(eos_ids), recipe=recipe, size=size
        )
        found, counts = np.asarray(found), np.asarray(counts)
        for row, number in enumerate(numbers):
            answers[number] = found[row, : counts[row]].tolist()
    return answers


def stream(
    transformer: Transformer,
    params: Params,
    prompt: Sequence[int],
    options: SamplingOptions,
    eos_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yields the token ids `generate` would return for the one prompt, as they come.

    Raises:
      UserError: as `generate`, at once rather than at the first token.
    """
    _check(prompt, transformer.cfg, "prompt")
    return _stream(transformer, params, prompt, options, frozenset(eos_ids))


def _stream(transformer, params, prompt, options, eos_ids) -> Iterator[int]:
    recipe = _recipe(transformer, options)
    tokens, lengths = _left_padded([prompt], 1, 0)
    budget = int(_budgets(lengths, options, transformer.cfg)[0])
    keys = _row_keys(options.seed, [0])
    state = _start(params, tokens, lengths, keys, recipe=recipe, size=bucket(budget))
    for count in range(1, budget + 1):
        token = int(state.token[0])
        if token in eos_ids:
            return
        yield token
        if count < budget:
            state = _next(params, state, recipe=recipe)


def bucket(length: int) -> int:
    """Returns `length` rounded up to a multiple of 32, or of a quarter of its highest power of 2.

    >>> [bucket(n) for n in (1, 32, 33, 256, 257, 1000)]
    [32, 32, 64, 256, 320, 1024]
    """
    quantum = max(32, (1 << length.bit_length()) // 8)
    return -(-length // quantum) * quantum


def _recipe(transformer: Transformer, options: SamplingOptions) -> _Recipe:
    # Seed and length are arguments, not part of the compiled code.
    method = dataclasses.replace(options, seed=0, max_new_tokens=1)
    hooks = (transformer.constrain, transformer.spread)
    return _Recipe(transformer.cfg, transformer.dtype, *hooks, method)


def _check(prompt: Sequence[int], cfg: ModelConfig, where: str) -> None:
    if not prompt:
        raise UserError(f"{where}: is empty; expected at least one token, such as the begin token.")
    if len(prompt) >= cfg.max_context:
        raise UserError(
            f"{where}: has {len(prompt)} tokens and leaves no room for an answer; the model's "
            f"context is {cfg.max_context} tokens, shorten the prompt."
        )
    # The gather of embeddings clamps an index out of range instead of failing.
    if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
        raise UserError(
            f"{where}: has token ids {min(prompt)} to {max(prompt)}; the model's vocabulary has "
            f"{cfg.vocab_size}. Use the tokenizer that belongs to the model."
        )


def _left_padded(
    prompts: Sequence[Sequence[int]], rows: int, pad_id: int, least: int = 0
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    width = bucket(max(least, *map(len, prompts)))
    tokens, lengths = np.full((rows, width), pad_id, np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


def _budgets(lengths: np.ndarray, options: SamplingOptions, cfg: ModelConfig) -> np.ndarray:
    return np.minimum(options.max_new_tokens, cfg.max_context - lengths)


def _row_keys(seed: int, numbers: Sequence[int]) -> Key[Array, "B"]:
    numbered = np.asarray(numbers, np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbered)


def _as_array(ids: Collection[int]) -> np.ndarray:
    return np.asarray(sorted(ids), np.int32)


def _prefill(params, tokens, lengths, keys, recipe: _Recipe, size: int) -> _State:
    """Reads the prompts, samples the first token; the cache has room for `size` tokens more."""
    rows, width = tokens.shape
    model = recipe.bound(params)
    padding = width - lengths[:, None]
    positions = jnp.maximum(jnp.arange(width) - padding, 0)
    segments = (jnp.arange(width) >= padding).astype(jnp.int32)
    apart = any(map(is_apart, jax.tree.leaves(params, is_leaf=is_apart)))
    cache = empty_cache(recipe.cfg, rows, width + size, recipe.dtype, apart=apart)
    logits, cache = _read(model, tokens, positions, segments, cache)
    seen = None
    if recipe.options.repetition_penalty != 1:
        seen = jnp.zeros((rows, recipe.cfg.vocab_size), bool)
        seen = seen.at[jnp.arange(rows)[:, None], tokens].max(segments.astype(bool))
    state = _State(cache, tokens[:, -1], lengths - 1, seen, keys, jnp.int32(-1))
    return _sampled(logits, state, cache, recipe.options)


def _advance(params, state: _State, recipe: _Recipe) -> _State:
    """Shows the model the last sampled token and samples the next."""
    model = recipe.bound(params)
    tokens, positions = state.token[:, None], state.positions[:, None]
    logits, cache = _read(model, tokens, positions, jnp.ones_like(tokens), state.cache)
    return _sampled(logits, state, cache, recipe.options)


def _read(
    model: Transformer, tokens, positions, segments, cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns the logits after the last column of tokens, and the cache with all of them."""
    hidden, grown = model(tokens, positions, segments, cache)
    assert grown is not None
    return model.logits(hidden[:, -1]), grown


def _sampled(logits, state: _State, cache: Cache, options: SamplingOptions) -> _State:
    step, seen = state.step + 1, state.seen
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, step)
    token = sample(logits, keys, options, seen)
    if seen is not None:
        seen = seen.at[jnp.arange(token.size), token].set(True)
    return _State(cache, token, state.positions + 1, seen, state.keys, step)


@partial(jax.jit, static_argnames=("recipe", "size"))
def _start(params, tokens, lengths, keys, *, recipe: _Recipe, size: int) -> _State:
    return _prefill(params, tokens, lengths, keys, recipe, size)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def _next(params, state: _State, *, recipe: _Recipe) -> _State:
    return _advance(params, state, recipe)


@partial(jax.jit, static_argnames=("recipe", "size"))
def _decode_batch(
    params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
    budgets: Int[Array, "B"],
    eos_ids: Int[Array, "E"],
    *,
    recipe: _Recipe,
    size: int,
) -> tuple[Int[Array, "B size"], Int[Array, "B"]]:
    """Returns sampled tokens and how many of each row belong to its answer."""

    def record(state: _State, found, counts, live):
        found = found.at[:, state.step].set(state.token)
        live &= ~jnp.any(state.token[:, None] == eos_ids, axis=-1)
        counts += live
        return state, found, counts, live & (counts < budgets)

    def going(carry):
        return jnp.any(carry[-1])

    def another(carry):
        state, *rest = carry
        return record(_advance(params, state, recipe), *rest)

    first = _prefill(params, tokens, lengths, keys, recipe, size)
    found, counts = jnp.zeros((tokens.shape[0], size), jnp.int32), jnp.zeros_like(budgets)
    _, found, counts, _ = jax.lax.while_loop(
        going, another, record(first, found, counts, budgets > 0)
    )
    # Whole on every device, or a process could not read what others sampled.
    return recipe.constrain(found, (None, None)), recipe.constrain(counts, (None,))
