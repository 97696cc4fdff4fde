"""How the layers of a model are stacked for `jax.lax.scan`, and in what they differ.

Layers whose parameters have the same shapes share a stack. What differs in values only (window,
rotary base) is an index into a small table, scanned with the weights, so that a model with any
pattern of sliding and full layers still compiles one layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlora.models.config import ModelConfig
from jaxlora.ops.attention import Visibility
from jaxlora.ops.rope import Angles, RopeScaling, rope_angles


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What decides which parameters a layer has, beside the model's config.

    Attributes:
      norms: see `ModelConfig.norms`.
      experts: whether it has a mixture of experts in place of the MLP.
    """

    norms: tuple[str, ...]
    experts: bool = False


@dataclasses.dataclass(frozen=True)
class Stack:
    """A run of layers scanned together.

    Attributes:
      names: a name for every layer of the period, e.g. ``("layers",)``; a path's first part.
      shapes: their shapes.
      layers: the checkpoint's layer numbers under each name, all of one length.
    """

    names: tuple[str, ...]
    shapes: tuple[LayerShape, ...]
    layers: tuple[tuple[int, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A stacked leaf as one array for each layer.

    A scan copies each layer out of its stack before it is used, on a CPU as much traffic again as
    using it. Where a token costs one pass over the weights, layers apart are worth compiling all.
    """

    layers: tuple[Any, ...]


def is_apart(leaf: Any) -> bool:
    """Whether a leaf is `Apart`; as `is_leaf` of `jax.tree` it keeps them whole."""
    return isinstance(leaf, Apart)


def each_layer(
    period: Callable[[Any, Any], tuple[Any, Any]], x: Any, stacked: Any, count: int
) -> tuple[Any, Any]:
    """`jax.lax.scan`, as a loop over `count` layers if any leaf of `stacked` is `Apart`.

    What `period` makes of each layer is then `Apart` too.
    """
    if not any(map(is_apart, jax.tree.leaves(stacked, is_leaf=is_apart))):
        return jax.lax.scan(period, x, stacked)
    made = []
    for number in range(count):
        x, out = period(x, _layer(stacked, number))
        made.append(out)
    return x, jax.tree.map(lambda *layers: Apart(layers), *made)


def _layer(stacked: Any, number: int) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.layers[number] if is_apart(leaf) else leaf[number],
        stacked,
        is_leaf=is_apart,
    )


def layer_shapes(cfg: ModelConfig) -> tuple[LayerShape, ...]:
    """Returns the shape of every layer."""
    bare = tuple(place for place in cfg.norms if place != "attention_in")
    sparse = () if cfg.moe is None else cfg.moe.layers
    return tuple(
        LayerShape(bare if layer in cfg.bare_layers else cfg.norms, layer in sparse)
        for layer in range(cfg.num_layers)
    )


def make_stacks(cfg: ModelConfig) -> tuple[Stack, ...]:
    """Returns the layers as few stacks, each the longest repetition of a period of shapes.

    >>> cfg = ModelConfig(vocab_size=8, embed_dim=4, mlp_dim=8, num_layers=3, num_heads=2,
    ...     num_kv_heads=1, head_dim=2, max_context=16, norm_eps=1e-5)
    >>> make_stacks(cfg)[0].layers
    ((0, 1, 2),)
    """
    shapes = layer_shapes(cfg)
    runs = []
    start = 0
    while start < len(shapes):
        period, repeats = _longest_repetition(shapes[start:])
        runs.append((start, period, repeats))
        start += period * repeats
    alone = len(runs) == 1 and runs[0][1] == 1
    stacks, number = [], 0
    for start, period, repeats in runs:
        names = ("layers",) if alone else tuple(f"layers_{number + i}" for i in range(period))
        number += period
        layers = tuple(
            tuple(range(start + i, start + period * repeats, period)) for i in range(period)
        )
        stacks.append(Stack(names, shapes[start : start + period], layers))
    return tuple(stacks)


def _longest_repetition(shapes: tuple[LayerShape, ...]) -> tuple[int, int]:
    """``(period, repeats)`` at the start of `shapes` that covers most, the shortest period first;
    a period that does not repeat is one layer."""
    best = (1, 1)
    for period in range(1, len(shapes) // 2 + 1):
        repeats = 1
        while shapes[repeats * period : (repeats + 1) * period] == shapes[:period]:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = period, repeats
    return best


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """What a layer's attention sees: a window and a way to turn queries and keys.

    Attributes:
      window: see `ModelConfig.sliding_window`.
      rope: base and scaling; None turns nothing.
    """

    window: int | None
    rope: tuple[float, RopeScaling | None] | None


def attention_kinds(cfg: ModelConfig) -> tuple[AttentionKind, ...]:
    """Returns the kind of every layer."""
    kinds = []
    for layer in range(cfg.num_layers):
        sliding = cfg.sliding_layers is None or layer in cfg.sliding_layers
        window = cfg.sliding_window if sliding else None
        rope = (cfg.rope_theta, cfg.rope_scaling)
        if sliding and cfg.local_rope_theta is not None:
            rope = (cfg.local_rope_theta, None)
        kinds.append(AttentionKind(window, None if layer in cfg.nope_layers else rope))
    return tuple(kinds)


class AttentionInputs:
    """What queries see and rotary angles, of every kind of attention in a model, for one batch.

    Args:
      cfg: shape of the model.
      positions, segments: of the queries, see `Transformer`.
      cached: positions and segments of the keys in a cache; None where they are the queries'.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cached: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None = None,
    ):
        every = attention_kinds(cfg)
        kinds = list(dict.fromkeys(every))
        self._numbers = [kinds.index(kind) for kind in every]
        key_positions, key_segments = (positions, segments) if cached is None else cached
        self._visible = Visibility(
            positions,
            key_positions,
            segments,
            key_segments,
            windows=tuple(kind.window for kind in kinds),
            causal=cfg.causal,
            in_place=cached is None,
        )
        rotary_dim = cfg.head_dim if cfg.rotary_dim is None else cfg.rotary_dim
        self._angles = _by_kind(
            [kind.rope for kind in kinds],
            lambda rope: _angles(positions, rotary_dim, rope) if rotary_dim else None,
        )

    def numbers(self, layers: tuple[int, ...]) -> Int[Array, "L"]:
        """Returns the kind number of each of `layers`, to be scanned over."""
        return jnp.asarray([self._numbers[layer] for layer in layers], jnp.int32)

    def of(self, number: Int[Array, ""]) -> tuple[Visibility, Angles | None]:
        """Returns what is seen and the angles (None without rotary positions) of a kind."""
        visible = dataclasses.replace(self._visible, kind=number)
        return visible, _pick(self._angles, number)


def _angles(positions, rotary_dim: int, rope) -> Angles:
    if rope is None:  # by an angle of 0
        still = jnp.zeros((*positions.shape, 1, rotary_dim // 2), jnp.float32)
        return still + 1.0, still
    return rope_angles(positions, rotary_dim, *rope)


def _by_kind(options: list[Any], make: Callable[[Any], Any]) -> tuple[bool, Any]:
    """``(False, arrays [kinds, ...])`` made from each option, ``(True, array)`` if all are equal:
    then nothing is picked at run time."""
    made = {option: make(option) for option in dict.fromkeys(options)}
    if len(made) == 1:
        return True, made[options[0]]
    stacked = [made[option] for option in options]
    return False, jax.tree.map(lambda *each: jnp.stack(each), *stacked)


def _pick(table: tuple[bool, Any], number: Int[Array, ""]) -> Any:
    all_equal, value = table
    return value if all_equal else jax.tree.map(lambda each: each[number], value)
