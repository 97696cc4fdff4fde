"""The attention of a run: what its configuration asks for, on its devices."""

from jax.typing import DTypeLike

from jaxlora.config import derived
from jaxlora.config.schema import Config
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
      most_segments: how many examples a row holds at most; None for not known yet.

    Raises:
      UserError: see `choose_backend`.
    """
    platform = placement.mesh.devices.flat[0].platform
    backend = choose_backend(
        cfg,
        platform,
        dtype,
        asked=derived.attention_backend(config),
        most_segments=most_segments if config.sample_packing else 1,
    )
    attend = on_each_device(backend.attend, placement) if backend.per_device else backend.attend
    return attend, (backend.note,) if backend.note else ()
