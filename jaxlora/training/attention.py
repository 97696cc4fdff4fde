"""The attention of a run: what its configuration asks for, on its devices."""

from jax.typing import DTypeLike

from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.models.attention_backend import choose_backend
from jaxlora.models.config import ModelConfig
from jaxlora.ops.attention import Attend
from jaxlora.parallel.attention import on_each_device
from jaxlora.parallel.head_shares import HeadShares, shares_over_context
from jaxlora.parallel.rules import Placement


def attention_of(
    config: Config,
    cfg: ModelConfig,
    dtype: DTypeLike,
    placement: Placement,
    most_segments: int | None = None,
) -> tuple[Attend, tuple[str, ...]]:
    """Returns what the layers call, and notes for the log.

    Args:
      config: of the run.
      cfg: shape of its model.
      dtype: of the activations.
      placement: the mesh.
      most_segments: how many examples a row holds at most; None for not known yet, then it is one
        where nothing is packed.

    Raises:
      UserError: see `choose_backend`; a kernel where the tokens of a row stay split.
    """
    mesh, asked = placement.mesh, derived.attention_backend(config)
    platform, context = mesh.devices.flat[0].platform, mesh.shape["context"]
    shares = shares_over_context(mesh, cfg.num_heads, cfg.num_kv_heads) if context > 1 else None
    gathers = context > 1 and shares is None
    if gathers:
        asked = _for_split_rows(asked, platform, cfg.num_heads, context)
    if most_segments is None and not (config.sample_packing or derived.eval_packing(config)):
        most_segments = 1
    backend = choose_backend(cfg, platform, dtype, asked=asked, most_segments=most_segments)
    per_device = context > 1 or backend.per_device
    attend = on_each_device(backend.attend, placement) if per_device else backend.attend
    notes = [backend.note, _of_sharing(cfg.num_heads, shares, context)]
    return attend, tuple(note for note in notes if note)


def _for_split_rows(asked: str, platform: str, num_heads: int, context: int) -> str:
    """What to ask for where no device has a whole row."""
    if asked in ("cudnn", "splash"):
        raise UserError(
            f"attn_implementation: {asked} needs whole rows, and {num_heads} heads are too few to "
            f"be shared out over mesh.context: {context}; leave it out, or set chunked."
        )
    return "chunked" if asked == "auto" and platform != "cpu" else asked


def _of_sharing(num_heads: int, shares: HeadShares | None, context: int) -> str:
    """A note on heads that do not share out evenly over `context`."""
    if context == 1 or (shares and shares.filled == shares.num_heads):
        return ""
    if shares is None:
        return (
            f"attention over mesh.context: {context} gathers keys and values and computes all "
            f"scores: {num_heads} heads are too few to be shared out"
        )
    return (
        f"attention over mesh.context: {context}: {shares.num_heads} heads are filled up with "
        f"zeros to {shares.filled}; a size that divides {shares.num_heads} wastes nothing"
    )
