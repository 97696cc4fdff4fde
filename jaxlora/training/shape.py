"""What a run computes and where, as far as it follows from its description: no weights, no data."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax

from jaxlora.checkpoints.adapter import LoadedAdapter
from jaxlora.checkpoints.label_head import with_head
from jaxlora.config import derived, settings
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig, Target
from jaxlora.lora.parts import Parts
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec, describe
from jaxlora.models.task import task_of
from jaxlora.models.transformer import Transformer
from jaxlora.parallel.experts import on_each_device as experts_on_each_device
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.training.attention import attention_of
from jaxlora.training.leaves import trained_leaves


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model as it is trained.

    Attributes:
      cfg: its shape: with new tokens, or a head of its own.
      targets: leaves with an adapter; empty in full fine-tuning.
      parts: leaves that train with all their numbers, whole or in part.
      transformer: unbound.
      placement: where its arrays live.
      notes: what the user should know of its attention, and of what is recomputed.
    """

    cfg: ModelConfig
    specs: dict[str, ParamSpec]
    targets: dict[str, Target]
    parts: Parts
    transformer: Transformer
    placement: Placement
    notes: tuple[str, ...] = ()


def adapter_options(
    config: Config, wanted: ModelConfig, fresh: Collection[str]
) -> LoraConfig | None:
    """Returns the options of a fresh adapter for a model, None in full fine-tuning.

    Args:
      config: the run.
      wanted: the model, with the head it shall have.
      fresh: paths of the leaves that the base lacks.
    """
    lora = settings.lora_config(config)
    if lora is None:
        return None
    return with_head(dataclasses.replace(lora, task_type=task_of(wanted).peft), wanted, fresh)


def shape_of_run(
    config: Config,
    cfg: ModelConfig,
    lora: LoraConfig | None,
    start: LoadedAdapter | None,
    fresh: Collection[str] = (),
    *,
    devices: Sequence[Any] | None = None,
    platform: str | None = None,
) -> Shape:
    """Returns what is trained of a model, and where.

    Args:
      config: the run.
      cfg: from `jaxlora.checkpoints.fitted.fit`.
      lora: options of the adapter, None in full fine-tuning.
      start: the adapter of `lora_model_dir`.
      fresh: paths of the leaves that the base lacks.
      devices: default those of this machine.
      platform: JAX's word for what they are, ``cpu``, ``gpu`` or ``tpu``; default: they say it.

    Raises:
      UserError: rules that match nothing, a mesh that does not fit the devices or `sequence_len`.
    """
    devices = jax.devices() if devices is None else list(devices)
    targets, parts = trained_leaves(config, cfg, lora, start, fresh)
    placement = Placement(make_mesh(settings.mesh_sizes(config), devices))
    _check_length(config, placement.mesh.shape["context"])
    dtype = derived.compute_dtype(config, platform or devices[0].platform)
    attend, notes = attention_of(config, cfg, dtype, placement)
    remat, more = _remat_on(config, platform or devices[0].platform)
    transformer = Transformer(
        cfg,
        dtype=dtype,
        remat=remat,
        constrain=placement.constrain,
        attend=attend,
        spread=experts_on_each_device(placement),
        context=placement.mesh.shape["context"],
    )
    return Shape(cfg, describe(cfg), targets, parts, transformer, placement, (*notes, *more))


def _remat_on(config: Config, platform: str) -> tuple[str, tuple[str, ...]]:
    """What is recomputed on a platform, and a note. `auto` recomputes nothing until it is known."""
    policy = derived.remat_policy(config)
    if policy == "offload" and platform == "cpu":
        return "full", ("remat: offload is full on a CPU, whose memory is the host's already",)
    return "none" if policy == "auto" else policy, ()


def _check_length(config: Config, context: int) -> None:
    """Refuses rows whose tokens cannot be shared out evenly."""
    if config.sequence_len % context:
        rounded = -(-config.sequence_len // context) * context
        raise UserError(
            f"sequence_len: {config.sequence_len} does not divide by the {context} devices of "
            f"mesh.context; use {rounded}."
        )
