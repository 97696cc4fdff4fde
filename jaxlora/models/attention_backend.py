"""Which implementation of attention a model runs on a device."""

import dataclasses
import functools

from jax.typing import DTypeLike

from jaxlora.core.errors import UserError
from jaxlora.models.config import ModelConfig
from jaxlora.ops import attention_cudnn, attention_splash
from jaxlora.ops.attention import Attend, reference_attention
from jaxlora.ops.attention_chunked import chunked_attention
from jaxlora.ops.attention_cudnn import CudnnAttention
from jaxlora.ops.attention_splash import SplashAttention

# Here chunks are level on a CPU, from there on faster, up to four times (benchmarks/LOG.md).
_CPU_CHUNKED_FROM = 64
# A GPU or TPU without a kernel for the model: larger products, fewer turns of the loop.
_DEVICE_CHUNK = 256

BACKENDS = ("reference", "chunked", "cudnn", "splash")
_KERNEL_OF = {"gpu": "cudnn", "tpu": "splash"}


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation, and why it is not the platform's own.

    Attributes:
      name: one of `BACKENDS`.
      attend: what layers call.
      note: for the log; empty where the platform's kernel serves.
      per_device: whether it knows no mesh, so that each device must be given its own share.
    """

    name: str
    attend: Attend
    note: str = ""
    per_device: bool = False


def choose_backend(
    cfg: ModelConfig,
    platform: str,
    dtype: DTypeLike,
    *,
    asked: str = "auto",
    most_segments: int | None = None,
) -> Backend:
    """Returns the attention of a model's training and evaluation.

    Args:
      cfg: shape of the model.
      platform: ``cpu``, ``gpu`` or ``tpu``.
      dtype: of the activations.
      asked: one of `BACKENDS`, or ``auto``: the platform's kernel where it can, else chunks.
      most_segments: how many segments a row has at most, if that is known.

    Raises:
      UserError: a kernel was asked for that the platform or the model cannot use.
    """
    kernel = _KERNEL_OF.get(platform)
    why_not = None if kernel is None else _why_not(kernel, cfg, dtype)
    if asked in _KERNEL_OF.values():
        if asked != kernel:
            raise UserError(
                f"attn_implementation: {asked} does not run on a {platform}; leave it out, or set "
                "chunked or reference."
            )
        if why_not:
            raise UserError(
                f"attn_implementation: {asked} cannot serve this model: {why_not}; leave it out, "
                "or set chunked or reference."
            )
    name, note = asked, ""
    if asked == "auto":
        name = "chunked" if kernel is None or why_not else kernel
        note = f"attention in chunks, not by {kernel}: {why_not}" if why_not else ""
    on_cpu = chunked_attention if asked == "chunked" else _by_length
    attends: dict[str, Attend] = {
        "reference": reference_attention,
        "chunked": on_cpu if platform == "cpu" else _chunked_on_device,
        "cudnn": CudnnAttention(most_segments),
        "splash": SplashAttention(),
    }
    return Backend(name, attends[name], note, per_device=name in _KERNEL_OF.values())


def _why_not(kernel: str, cfg: ModelConfig, dtype: DTypeLike) -> str | None:
    if kernel == "splash":
        return attention_splash.cannot(sinks=cfg.attention_sinks)
    return attention_cudnn.missing() or attention_cudnn.cannot(
        dtype,
        cfg.head_dim,
        cfg.value_dim,
        softcap=cfg.attention_softcap,
        sinks=cfg.attention_sinks,
    )


def _by_length(q, k, v, visible, **options):
    short = q.shape[1] < _CPU_CHUNKED_FROM
    return (reference_attention if short else chunked_attention)(q, k, v, visible, **options)


_chunked_on_device = functools.partial(chunked_attention, chunk=_DEVICE_CHUNK)
