"""Grouped-query attention: what a query may see, and the reference implementation (einsum)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

_NO_WINDOW = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query may see: same segment, not later, nearer than a window.

    Segment 0 is padding; positions restart at 0 in every segment of a packed row.

    Attributes:
      kind: number, in `windows`, of the one that holds.
      windows: how many latest tokens are seen, the query itself among them; None for all. A model
        has few, and the layers of a scan differ in `kind` only.
      causal: False lets a query see both ways.
      in_place: whether keys and queries are the same tokens, every segment a run of them whose
        positions count up by one, and padding only at the end. A kernel may then count places where
        this class says positions.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    kind: Int[Array, ""] | int = 0
    windows: tuple[int | None, ...] = dataclasses.field(default=(None,), metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    in_place: bool = dataclasses.field(default=False, metadata={"static": True})

    def mask(self) -> Bool[Array, "B T S"]:
        """Returns what the fields say, for every pair of a query and a key."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        visible = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.causal:
            visible &= distance >= 0
        if set(self.windows) == {None}:
            return visible
        sizes = [_NO_WINDOW if window is None else window for window in self.windows]
        window = sizes[0] if len(set(sizes)) == 1 else jnp.asarray(sizes, jnp.int32)[self.kind]
        return visible & (jnp.abs(distance) < window)


class Attend(Protocol):
    """Softmax attention, scores and softmax in float32; N query heads share K key-value heads."""

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K W"],
        visible: Visibility,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Float[Array, "N"] | None = None,
    ) -> Float[Array, "B T N W"]:
        """Returns a weighted mean of values for every query.

        What the backward pass should find saved is named "attention" (`jax.ad_checkpoint`): of the
        plain ones the result, of the kernels what theirs read.

        Args:
          visible: which keys a query may see.
          scale: what scores are multiplied by; default ``H ** -0.5``.
          softcap: scores are bent into ``(-softcap, softcap)`` by a tanh (Gemma 2).
          sinks: one more score per head that takes weight and gives no value (gpt-oss).
        """
        ...


def for_each_window(
    visible: Visibility, length: int, attend: Callable[[int | None], Array]
) -> Array:
    """Returns ``attend(window)`` for the window that `visible.kind` picks, windows being static.

    Args:
      visible: whose windows.
      length: of a row; a window that holds all of it is None.
      attend: what a kernel made for one window returns.
    """
    windows = [None if window is None or window >= length else window for window in visible.windows]
    kinds = list(dict.fromkeys(windows))
    if len(kinds) == 1:
        return attend(kinds[0])
    number = jnp.asarray([kinds.index(window) for window in windows])[visible.kind]
    # A branch keeps nothing for the backward pass: what each kept would be kept of all.
    branches = [jax.checkpoint(functools.partial(attend, window)) for window in kinds]
    return jax.lax.switch(number, branches)


def reference_attention(q, k, v, visible, *, scale=None, softcap=None, sinks=None):
    """`Attend` in its plainest form: all scores at once, any mask, any device."""
    y = masked_attention(q, k, v, visible.mask(), scale=scale, softcap=softcap, sinks=sinks)
    return checkpoint_name(y, "attention")


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N W"]:
    """`Attend` for a mask that is there already."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    y = jnp.einsum("BKGTS,BSKW->BTKGW", weights.astype(v.dtype), v)
    return y.reshape(batch, length, num_heads, v.shape[-1])
