"""What PEFT wants to know of a base model's parameters."""

from collections.abc import Mapping

from jaxlora.lora.targets import Target
from jaxlora.models.parameters import ParamSpec


def has_fan_in(specs: Mapping[str, ParamSpec], targets: Mapping[str, Target]) -> bool:
    """Returns whether the base's adapted layers hold ``[in, out]`` (GPT-2)."""
    return any(specs[path].kind == "linear" and not specs[path].transposed for path in targets)


def weighted_modules(specs: Mapping[str, ParamSpec]) -> set[str]:
    """Returns the module paths that have a weight."""
    return {module for spec in specs.values() for module in spec.modules()}


def bias_modules(specs: Mapping[str, ParamSpec]) -> dict[str, list[str]]:
    """Returns ``{leaf path: module paths}`` of the biases that PEFT can train, for `with_biases`.

    Those that have a tensor of their own, norms' included: PEFT finds them by the end of its name.
    """
    return {
        path: spec.modules()
        for path, spec in specs.items()
        if spec.hf_names == (f"{spec.module}.bias",)
    }
