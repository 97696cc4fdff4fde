"""Which weights of a model an adapter's rules select."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.lora.config import LoraConfig
from jaxlora.lora.parameters import match_parameters
from jaxlora.lora.targets import Target, is_suffix, match
from jaxlora.models.parameters import ParamSpec

# The order in which transformers' modules of experts hold their weights.
_HELD = ("gate_up_proj", "down_proj")


_WEIGHT = ".weight"
# Not linear to PEFT's "all-linear", which leaves them out.
_TABLES = ("head", "embedding")


def adaptable_modules(specs: Mapping[str, ParamSpec]) -> dict[str, list[str]]:
    """Returns ``{leaf path: module path of each layer}`` of linear modules, head and tables."""
    kinds = ("linear", *_TABLES)
    return {path: spec.modules() for path, spec in specs.items() if spec.kind in kinds}


def adaptable_parameters(specs: Mapping[str, ParamSpec]) -> dict[str, list[str]]:
    """Returns ``{leaf path: parameter path of each layer}`` of experts and routers.

    >>> from jaxlora.models.config import ModelConfig, Moe
    >>> from jaxlora.models.parameters import describe
    >>> from jaxlora.ops.experts import Routing
    >>> cfg = ModelConfig(vocab_size=8, embed_dim=4, mlp_dim=8, num_layers=1, num_heads=2,
    ...     num_kv_heads=1, head_dim=2, max_context=16, norm_eps=1e-5, family="MixtralForCausalLM",
    ...     moe=Moe((0,), num_experts=2, mlp_dim=8, routing=Routing(1)))
    >>> for names in adaptable_parameters(describe(cfg)).values(): print(*names)
    model.layers.0.mlp.gate.weight
    model.layers.0.mlp.experts.gate_up_proj
    model.layers.0.mlp.experts.down_proj
    """
    routers = {
        path: [f"{module}.weight" for module in spec.modules()]
        for path, spec in specs.items()
        if spec.kind == "router"
    }
    experts = {path: spec.modules() for path, spec in specs.items() if spec.kind == "experts"}
    held = sorted(experts, key=lambda path: _HELD.index(experts[path][0].rpartition(".")[2]))
    return routers | {path: experts[path] for path in held}


def targets_of_specs(specs: Mapping[str, ParamSpec], config: LoraConfig) -> dict[str, Target]:
    """Returns the targets of `config` in a model.

    Args:
      specs: from `describe`.
      config: the rules.

    Raises:
      UserError: a rule that matches nothing.
    """
    parameters = adaptable_parameters(specs)
    stacked = [path for path, spec in specs.items() if spec.layers is not None]
    names = [name for each in parameters.values() for name in each]
    experts = {path: specs[path].shape[0] for path in parameters if specs[path].kind == "experts"}
    tables = {path: spec.kind for path, spec in specs.items() if spec.kind in _TABLES}
    return {
        **match(adaptable_modules(specs), config, stacked, names, tables),
        **match_parameters(parameters, config, stacked=stacked, experts=experts),
    }


def weights_as_modules(config: LoraConfig, modules: Sequence[str]) -> LoraConfig:
    """Returns `config` with linear modules that it names by their weight named as modules.

    An adapter of either is the same, and in PEFT's files has the same tensors.

    >>> config = LoraConfig(target_modules=("q_proj",), target_parameters=("mlp.up_proj.weight",))
    >>> weights_as_modules(config, ["h.0.q_proj", "h.0.mlp.up_proj"]).target_modules
    ('q_proj', 'mlp.up_proj')
    """
    rules = config.target_parameters
    moved = {
        rule: rule.removesuffix(_WEIGHT)
        for rule in rules
        if rule.endswith(_WEIGHT)
        and any(is_suffix(rule.removesuffix(_WEIGHT), module) for module in modules)
    }
    if not moved or isinstance(config.target_modules, str):
        return config

    def renamed(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {moved.get(name, name): value for name, value in patterns.items()}

    return dataclasses.replace(
        config,
        target_modules=(*config.target_modules, *moved.values()),
        target_parameters=tuple(rule for rule in rules if rule not in moved),
        rank_pattern=renamed(config.rank_pattern),
        alpha_pattern=renamed(config.alpha_pattern),
    )
