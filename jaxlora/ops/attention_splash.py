"""Attention by JAX's splash kernels (TPUs): scores stay in the chip's fast memory."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlora.ops.attention import Visibility, for_each_window

_LANES = 128  # rows and channels come in multiples of it
_BLOCKS = (512, 256, 128)


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """`Attend` by splash kernels, for visibilities that are `in_place`.

    Attributes:
      interpret: runs the kernels in Python, on any device (tests).
    """

    interpret: bool = False

    def __call__(self, q, k, v, visible: Visibility, *, scale=None, softcap=None, sinks=None):
        why_not = cannot(sinks=sinks is not None)
        assert why_not is None, why_not
        assert visible.in_place
        length, channels = q.shape[1], v.shape[-1]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        # Heads come first, channels are filled up with zeros, rows with segments of their own.
        q, k, v = (_filled(jnp.swapaxes(x, 1, 2)) for x in (q, k, v))
        segments = jnp.pad(
            visible.query_segments, ((0, 0), (0, -length % _LANES)), constant_values=-1
        )

        def attend(window: int | None) -> Any:
            kernel = self._kernel(q.shape[1], q.shape[2], visible.causal, window, softcap)
            return jax.vmap(kernel)(q, k, v, _segment_ids(segments))

        y = for_each_window(visible, length, attend)
        return jnp.swapaxes(y, 1, 2)[:, :length, :, :channels]

    def _kernel(self, heads: int, length: int, causal: bool, window: int | None, softcap):
        from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

        block = next(size for size in _BLOCKS if length % size == 0)
        forward = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block)
        backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
        backward += ("block_q_dq", "block_kv_dq")
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask(length, causal, window)] * heads),
            block_sizes=splash.BlockSizes(**forward, **dict.fromkeys(backward, block)),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name="attention",
            interpret=self.interpret,
        )


def cannot(*, sinks: bool) -> str | None:
    """Returns why splash kernels cannot compute such an attention, None if they can."""
    return "they have no sinks" if sinks else None


def mask(length: int, causal: bool, window: int | None) -> Any:
    """Returns splash's mask of a row of so many tokens."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, past = (length, length), None if window is None else window - 1
    if past is None and not causal:
        return splash.FullMask(shape)
    return _band()(shape, (past, 0 if causal else past), 0)


@functools.cache
def _band() -> type:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class Band(splash.LocalMask):
        """Keys at most so many places before or after a query.

        Splash looks at every block of a mask, for whether it sees all, some or nothing: 40 s of a
        row of 131,072 tokens. One number says that of most.
        """

        def __getitem__(self, idx):
            queries, keys = idx
            past, future = (math.inf if size is None else size for size in self.window_size)
            nearest, farthest = queries.start - keys.stop + 1, queries.stop - 1 - keys.start
            if -future <= nearest and farthest <= past:
                return np.ones((1, 1), np.bool_)
            if farthest < -future or nearest > past:
                return np.zeros((1, 1), np.bool_)
            return super().__getitem__(idx)

    return Band


def _segment_ids(segments: Int[Array, "B T"]):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(segments, segments)


def _filled(x: Array) -> Array:
    """Rows and channels of ``[B, heads, rows, channels]`` filled up with zeros."""
    rows, channels = -x.shape[2] % _LANES, -x.shape[3] % _LANES
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, channels)))
