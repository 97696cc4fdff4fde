"""The attention of a run: what its configuration asks for, on its devices."""

from jax.typing import DTypeLike

from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.models.attention_backend import choose_backend
from jaxlora.models.config import ModelConfig
from jaxlora.ops.attention import Attend
from jaxlora.parallel.attention import on_each_device
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
      UserError: see `choose_backend`; a kernel for rows whose tokens are split.
    """
    platform, asked = placement.mesh.devices.flat[0].platform, derived.attention_backend(config)
    split = placement.mesh.shape["context"] > 1
    if split and asked in ("cudnn", "splash"):
        raise UserError(
            f"attn_implementation: {asked} needs all tokens of a row on one device, and "
            "mesh.context splits them; leave it out, or set chunked."
        )
    if split and asked == "auto" and platform != "cpu":
        asked = "chunked"
    if most_segments is None and not (config.sample_packing or derived.eval_packing(config)):
        most_segments = 1
    backend = choose_backend(cfg, platform, dtype, asked=asked, most_segments=most_segments)
    per_device = split or backend.per_device
    attend = on_each_device(backend.attend, placement) if per_device else backend.attend
    return attend, (backend.note,) if backend.note else ()
