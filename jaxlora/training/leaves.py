"""Which leaves a run trains."""

import dataclasses
from collections.abc import Collection, Mapping

from jaxlora.checkpoints.adapter import LoadedAdapter
from jaxlora.checkpoints.fitted import adapter_parts
from jaxlora.checkpoints.peft_base import bias_modules, refuse_unloadable
from jaxlora.checkpoints.regions import Region
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.lora.biases import with_biases
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.initializers import changes_base
from jaxlora.lora.parts import Part, Parts
from jaxlora.lora.targets import Target
from jaxlora.lora.unfrozen import unfrozen
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec, describe
from jaxlora.models.targets import targets_of_specs
from jaxlora.parallel.rules import Placement


def trained_leaves(
    config: Config,
    cfg: ModelConfig,
    lora: LoraConfig | None,
    start: LoadedAdapter | None,
    fresh: Collection[str] = (),
) -> tuple[dict[str, Target], Parts]:
    """Returns ``(targets, parts)``: leaves with low-rank pairs, and leaves that train themselves.

    Args:
      config: the run.
      cfg: shape of the model that is trained.
      lora: options of the adapter, None in full fine-tuning.
      start: the adapter of `lora_model_dir`.
      fresh: paths of leaves that the base lacks, which train in any case.

    Raises:
      UserError: a rule that matches nothing, or a leaf that two of them claim.
    """
    specs = describe(cfg)
    if lora is None and config.unfrozen_parameters:
        own = {path: Part(specs[path].layers is not None) for path in fresh}
        return {}, unfrozen(specs, config.unfrozen_parameters) | own
    if lora is None:
        return {}, {path: Part(spec.layers is not None) for path, spec in specs.items()}
    if start is None:
        stacked = [path for path, spec in specs.items() if spec.layers is not None]
        pairs = targets_of_specs(specs, lora)
        targets = with_biases(pairs, bias_modules(specs), lora.train_bias, stacked)
        parts = adapter_parts(cfg, lora)
    else:
        targets, parts = _with_dropout(start.targets, config.lora_dropout), start.parts
    refuse_unloadable(specs, targets, lora)
    _refuse_odd_tables(lora, targets, specs)
    for path in targets.keys() & parts.keys():
        layers = parts[path].layers or range(len(targets[path].ranks))
        twice = [layer for layer in layers if targets[path].ranks[layer]]
        if twice:
            raise UserError(
                f"lora_modules_to_save: {targets[path].modules[twice[0]]} is one of "
                "lora_target_modules (or of peft_bias) too; leave it out of one of the two."
            )
    return targets, parts


def _refuse_odd_tables(
    lora: LoraConfig, targets: Mapping[str, Target], specs: Mapping[str, ParamSpec]
) -> None:
    """Refuses options that only linear layers have."""
    tables = [path for path in targets if specs[path].kind in ("embedding", "head")]
    for path in tables:
        name = targets[path].modules[0].rpartition(".")[2]
        if changes_base(lora.init):
            raise UserError(
                f"peft_init_lora_weights: {lora.init} is for linear layers inside the model, not "
                f"for {name}; leave it out of lora_target_modules."
            )
        if lora.lora_bias and targets[path].embedding:
            raise UserError(
                f"peft_lora_bias: {name} is no linear layer; leave it out of lora_target_modules."
            )


def _with_dropout(targets: Mapping[str, Target], dropout: float) -> dict[str, Target]:
    if dropout and any(target.nested for target in targets.values()):
        raise UserError(
            "lora_dropout: does not go with the adapter's target_parameters; remove it."
        )
    return {path: dataclasses.replace(target, dropout=dropout) for path, target in targets.items()}


def needed_part(placement: Placement, path: str, spec: ParamSpec, parts: Parts) -> Region | None:
    """Returns the part of a parameter that the devices of this process hold; None for all of it.

    Args:
      placement: the mesh.
      path, spec: the parameter.
      parts: what trains beside the pairs.
    """
    part = parts.get(path)
    if part is not None and not part.whole:
        return None
    own = placement.own_box(spec.axes, spec.shape)
    return own and Region(spec.shape, *own)
