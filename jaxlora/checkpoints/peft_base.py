"""What PEFT wants to know of a base model's parameters."""

from collections.abc import Mapping

from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.targets import Target
from jaxlora.models.parameters import ParamSpec


def has_fan_in(specs: Mapping[str, ParamSpec], targets: Mapping[str, Target]) -> bool:
    """Returns whether the base's adapted layers hold ``[in, out]`` (GPT-2)."""
    return any(specs[path].kind == "linear" and not specs[path].transposed for path in targets)


def expert_names(specs: Mapping[str, ParamSpec]) -> set[str]:
    """Returns the last module names of experts that a checkpoint holds one by one.

    PEFT takes these names in ``target_modules`` for the fused experts of transformers 5, also where
    a dense or shared MLP has them; the same module's weight in ``target_parameters`` it leaves be.
    """
    return {
        name.split(".")[-2]
        for spec in specs.values()
        if spec.kind == "experts" and spec.parts
        for name in spec.hf_names
    }


def refuse_unloadable(
    specs: Mapping[str, ParamSpec], targets: Mapping[str, Target], config: LoraConfig
) -> None:
    """Refuses what PEFT has no adapter for: DoRA and biases on linear layers beside experts.

    They are named by their weight there (`expert_names`), and such an adapter has neither.

    Raises:
      UserError: which layers, and what to do.
    """
    key = "peft_use_dora" if config.use_dora else "peft_lora_bias" if config.lora_bias else None
    names = {target.modules[0].rpartition(".")[2] for target in targets.values()}
    taken = sorted(names & expert_names(specs))
    if key and taken:
        others = sorted(names - set(taken))
        raise UserError(
            f"{key}: PEFT takes {', '.join(taken)} of this model for experts, which can have "
            f"none; name the other layers in lora_target_modules ({', '.join(others)}), or remove "
            f"{key}."
        )


def bias_modules(specs: Mapping[str, ParamSpec]) -> dict[str, list[str]]:
    """Returns ``{leaf path: module paths}`` of the biases that PEFT can train, for `with_biases`.

    Those that have a tensor of their own, norms' included: PEFT finds them by the end of its name.
    """
    return {
        path: spec.modules()
        for path, spec in specs.items()
        if spec.hf_names == (f"{spec.module}.bias",)
    }
