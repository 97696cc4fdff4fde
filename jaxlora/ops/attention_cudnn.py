"""Attention by cuDNN's fused kernels (NVIDIA GPUs, 16-bit activations)."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxlora.ops.attention import Visibility, for_each_window

# The kernel's scratch has a place for every segment that a row might have, each as large as the
# row's: 0.27 GB for 8192 tokens of 32 heads (benchmarks/LOG.md). Beyond this a bias is smaller.
MOST_PACKED = 8


@dataclasses.dataclass(frozen=True)
class CudnnAttention:
    """`Attend` by cuDNN, for visibilities that are `in_place`, padding at the end of rows.

    Attributes:
      most_segments: how many segments a row has at most. 1: rows are cut off where padding begins.
        Up to `MOST_PACKED`: segments are kept apart by their offsets. None for not known, or more:
        by a bias ``[B, 1, T, T]``, which any mask can be.
    """

    most_segments: int | None = None

    def __call__(self, q, k, v, visible: Visibility, *, scale=None, softcap=None, sinks=None):
        why_not = cannot(
            q.dtype, q.shape[-1], v.shape[-1], softcap=softcap, sinks=sinks is not None
        )
        assert why_not is None, why_not
        assert visible.in_place
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        most = self.most_segments

        def attend(window: int | None):
            by_lengths = visible.causal or window is None
            if by_lengths and most is not None and most <= MOST_PACKED:
                return _by_lengths(q, k, v, visible, window, scale, most)
            return _by_bias(q, k, v, visible, window, scale)

        return for_each_window(visible, q.shape[1], attend)


def cannot(
    dtype: DTypeLike, head_dim: int, value_dim: int, *, softcap: float | None, sinks: bool
) -> str | None:
    """Returns why cuDNN cannot compute such an attention, None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes heads of a multiple of 8 channels up to 256, not {head_dim}"
    if value_dim != head_dim:
        return "its keys and values have one width"
    if softcap is not None:
        return "it has no softcap"
    if sinks:
        return "it has no sinks"
    return None


def missing() -> str | None:
    """Returns why cuDNN cannot be called from here at all, None if it can."""
    cudnn = _kernels()
    if cudnn is None:
        return "this version of JAX has another interface to it"
    try:
        cudnn.check_cudnn_version()
    except Exception as error:  # what is raised depends on which library was not found
        return f"it is not on this machine ({error})"
    return None


def _kernels() -> Any:
    """JAX's private module, where its interface is the one known here (packing is in no other)."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module
    except ImportError:
        return None
    calls = {
        "_dot_product_attention": 10 + 9,  # operands and options
        "_dot_product_attention_fwd_rule": 10 + 9,
        "_dot_product_attention_bwd_rule": 9 + 2,  # options, what was kept, the gradient
    }
    found = {name: getattr(module, name, None) for name in calls}
    fits = all(
        function is not None and len(inspect.signature(function).parameters) == calls[name]
        for name, function in found.items()
    )
    fits = fits and all(hasattr(module, name) for name in ("MaskType", "AttentionLayout"))
    return module if fits else None


def _by_lengths(q, k, v, visible: Visibility, window, scale, most_segments: int):
    """Rows, or the segments packed in them, as sequences of their own lengths."""
    cudnn, segments = _kernels(), visible.query_segments
    real = segments > 0
    # What the kernel leaves between the sequences is nobody's, in both passes: it may be NaN.
    q, k, v = (_only(real, each) for each in (q, k, v))
    mask = cudnn.MaskType.PADDING_CAUSAL if visible.causal else cudnn.MaskType.PADDING
    if most_segments == 1:
        lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)
        options = {"q_seqlen": lengths, "kv_seqlen": lengths}
    else:
        lengths, offsets = spans(segments, most_segments)
        options = {"q_seqlen": lengths, "kv_seqlen": lengths}
        options |= {"q_offsets": offsets, "kv_offsets": offsets}
    return _only(real, _call(q, k, v, scale=scale, mask=mask, window=window, **options))


def spans(
    segments: Int[Array, "B T"], most: int
) -> tuple[Int[Array, "B most"], Int[Array, "B most+1"]]:
    """Returns length and first place of the segments 1, 2, ... of each row, -1 where there is none.

    >>> lengths, offsets = spans(jnp.array([[1, 1, 2, 0], [0, 0, 0, 0]]), 2)
    >>> lengths.tolist(), offsets.tolist()
    ([[2, 1], [-1, -1]], [[0, 2, -1], [-1, -1, -1]])
    """
    numbers = jnp.arange(1, most + 1, dtype=jnp.int32)
    lengths = jnp.sum(segments[:, :, None] == numbers, axis=1, dtype=jnp.int32)
    offsets = jnp.cumsum(lengths, axis=1) - lengths
    lengths, offsets = (jnp.where(lengths > 0, each, -1) for each in (lengths, offsets))
    return lengths, jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)


def _only(real: Bool[Array, "B T"], x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    return jnp.where(real[:, :, None, None], x, 0)


def _call(q, k, v, *, scale, mask, window, bias=None, **lengths):
    """Calls the kernel, naming what its backward pass reads, so that remat need not run it again.

    JAX's own function names nothing.
    """
    cudnn = _kernels()
    absent = jnp.zeros(0, q.dtype)
    names = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
    extra = [absent if bias is None else bias, *(lengths.get(name, absent) for name in names)]
    extra += [absent, absent]  # page tables
    layout, version = cudnn.AttentionLayout.BTNH.value, cudnn.check_cudnn_version()
    seed, dropout = 42, 0.0
    options = (
        scale,
        seed,
        dropout,
        (bias is not None, False),
        mask,
        layout,
        window,
        version,
        False,
    )

    # Everything is an operand: the rules are traced where closures over tracers would leak.
    @jax.custom_vjp
    def run(*operands):
        return cudnn._dot_product_attention(*operands, *options)

    def forward(*operands):
        _, kept = cudnn._dot_product_attention_fwd_rule(*operands, *options)
        *kept, statistics, y = kept
        statistics, y = (checkpoint_name(x, "attention") for x in (statistics, y))
        return y, (*kept, statistics, y)

    def backward(kept, dy):
        return cudnn._dot_product_attention_bwd_rule(*options, kept, dy)

    run.defvjp(forward, backward)
    return run(q, k, v, *extra)


def _by_bias(q, k, v, visible: Visibility, window, scale):
    """Any mask, added to the scores; blocks that nothing causal sees are skipped all the same."""
    cudnn = _kernels()
    visible = dataclasses.replace(visible, windows=(window,), kind=0)
    padding = -q.shape[1] % 2  # the backward kernel wants even rows
    hidden = cudnn.get_large_negative_number(q.dtype)
    bias = jnp.where(visible.mask(), 0, hidden).astype(q.dtype)[:, None]
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, padding), (0, padding)), constant_values=hidden)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    mask = cudnn.MaskType.CAUSAL if visible.causal else cudnn.MaskType.NO_MASK
    y = _call(q, k, v, bias=bias, scale=scale, mask=mask, window=None)
    return y[:, : y.shape[1] - padding]
