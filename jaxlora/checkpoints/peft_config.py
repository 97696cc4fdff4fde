"""adapter_config.json: PEFT's words for an adapter, written and read."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.targets import Target

Tokens = tuple[int, ...] | Mapping[str, tuple[int, ...]]

CONFIG_FILE = "adapter_config.json"

# What every PEFT since 0.10 and vLLM know. `init_lora_weights` is true because readers that find a
# matrix missing would otherwise leave it random.
_CONSTANT: dict[str, Any] = {
    "auto_mapping": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
}
# Keys we read, and keys that say nothing about what the adapter computes.
_READ = frozenset(
    """
    r lora_alpha lora_dropout target_modules target_parameters exclude_modules
    layers_to_transform layers_pattern
    rank_pattern alpha_pattern use_rslora use_dora lora_bias init_lora_weights peft_type bias
    modules_to_save trainable_token_indices
    """.split()
)
_IGNORED = frozenset(
    """
    base_model_name_or_path revision task_type inference_mode auto_mapping peft_version
    megatron_core loftq_config eva_config qalora_group_size runtime_config ensure_weight_tying
    fan_in_fan_out
    """.split()
)
# Initializers that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and others change them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def write_config(
    path: Path,
    targets: Mapping[str, Target],
    config: LoraConfig,
    *,
    base_name: str,
    revision: str | None,
    fan_in_fan_out: bool = False,
    base_modules: Collection[str] = (),
    expert_names: Collection[str] = (),
) -> None:
    """Writes the file so that PEFT selects exactly the modules of `targets`.

    Args:
      base_modules: module paths of the base that may have an adapter.
      expert_names: last names that PEFT would take for experts.
    """
    patterns = _patterns(targets, config, base_modules, expert_names)
    content = {
        **_CONSTANT,
        **patterns,
        "base_model_name_or_path": base_name,
        "bias": config.train_bias,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_alpha": _whole(config.alpha),
        # PEFT has none for parameters, and it says nothing about what the adapter computes.
        "lora_dropout": 0.0 if patterns["target_parameters"] else config.dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "r": config.r,
        "revision": revision,
        "task_type": config.task_type,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    if not content["target_parameters"]:  # a key that older readers do not know
        del content["target_parameters"]
    if config.lora_bias:  # a key that older readers do not know
        content["lora_bias"] = True
    if config.trainable_token_indices:
        content["trainable_token_indices"] = _sorted_tokens(config.trainable_token_indices)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sorted_tokens(tokens: Tokens) -> dict[str, list[int]] | list[int]:
    # The rows are kept in this order.
    if isinstance(tokens, Mapping):
        return {name: sorted(ids) for name, ids in tokens.items()}
    return sorted(tokens)


def _patterns(
    targets: Mapping[str, Target],
    config: LoraConfig,
    base_modules: Collection[str],
    expert_names: Collection[str],
) -> dict[str, Any]:
    """Selection and exceptions, derived from the targets: by suffix where all layers are alike.

    Rules as the user wrote them would be shorter, but PEFT sorts patterns on saving, and then
    another of two that overlap comes first.
    """
    targets = {path: target for path, target in targets.items() if not target.vector}
    # A parameter's last name alone may be that of a linear module elsewhere.
    leaf_names = [
        ".".join(target.modules[0].split(".")[-2 if target.nested else -1 :])
        for target in targets.values()
    ]
    last_names = [target.modules[0].rpartition(".")[2] for target in targets.values()]
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, leaf_name in zip(targets.values(), leaf_names, strict=True):
        layers = [
            (module, rank, config.alpha_of(scale, rank))
            for module, rank, scale in zip(target.modules, target.ranks, target.scales, strict=True)
            if rank
        ]
        alike = len(layers) == len(target.modules) and len({layer[1:] for layer in layers}) == 1
        # Patterns of ranks would take a module's last name for that of a parameter.
        alone = (leaf_names if target.nested else last_names).count(leaf_name) == 1
        as_weight = not target.nested and leaf_name in expert_names
        if as_weight:
            layers = [(f"{module}.weight", rank, alpha) for module, rank, alpha in layers]
        elif alike and alone and not _elsewhere(leaf_name, target, base_modules):
            layers = [(leaf_name, *layers[0][1:])]
        for name, rank, alpha in layers:
            (parameters if target.nested or as_weight else modules).append(name)
            if rank != config.r:
                ranks[name] = rank
            if alpha != config.alpha:
                alphas[name] = _whole(alpha)
    return {
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _elsewhere(name: str, target: Target, base_modules: Collection[str]) -> bool:
    """Whether a module without an adapter has this name too (BERT has a `dense` in many places)."""
    same_name = {module for module in base_modules if f".{module}".endswith(f".{name}")}
    return not same_name <= set(target.modules)


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def read_config(path: Path) -> LoraConfig:
    """Returns the adapter's options.

    Raises:
      UserError: not found, bad JSON, no LoRA, or a feature jaxlora does not have.
    """
    content = read_json_object(path, "expected an adapter folder in PEFT's layout")
    try:
        _refuse_unsupported(content)
        return _translate(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{path}: a field has a value of the wrong kind ({error}).") from error


def _refuse_unsupported(content: Mapping[str, Any]) -> None:
    if content.get("peft_type") != "LORA":
        raise UserError(f"peft_type: {content.get('peft_type')!r} is no LoRA; expected 'LORA'.")
    if content.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise UserError(
            f"init_lora_weights: {content['init_lora_weights']!r} changes the base weights, so the "
            "adapter is not for the plain base; save it with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    targets = content.get("target_modules") or content.get("target_parameters")
    for key, value in (("r", content.get("r")), ("target_modules", targets)):
        if not value:
            raise UserError(f"{key} is missing; export the adapter again.")
    for key, value in content.items():
        if value and key not in _READ and key not in _IGNORED:
            raise UserError(f"{key}: {value!r} is not supported; expected it to be absent or null.")


def _translate(content: Mapping[str, Any]) -> LoraConfig:
    layers = content.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    return LoraConfig(
        r=int(content["r"]),
        alpha=float(content.get("lora_alpha", 8)),
        dropout=float(content.get("lora_dropout") or 0.0),
        target_modules=_rule(content.get("target_modules") or ()),
        target_parameters=tuple(sorted(_names(content.get("target_parameters")))),
        exclude_modules=_rule(content.get("exclude_modules") or ()),
        layers_to_transform=tuple(int(layer) for layer in layers),
        layers_pattern=_names(content.get("layers_pattern")),
        rank_pattern={str(k): int(v) for k, v in (content.get("rank_pattern") or {}).items()},
        alpha_pattern={str(k): float(v) for k, v in (content.get("alpha_pattern") or {}).items()},
        modules_to_save=tuple(sorted(set(_names(content.get("modules_to_save"))))),
        trainable_token_indices=_tokens(content.get("trainable_token_indices")),
        use_rslora=bool(content.get("use_rslora")),
        use_dora=bool(content.get("use_dora")),
        lora_bias=bool(content.get("lora_bias")),
        train_bias=content.get("bias") or "none",
        task_type=content.get("task_type", "CAUSAL_LM"),
    )


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())


def _tokens(value: Any) -> Tokens:
    if isinstance(value, Mapping):
        return {str(name): tuple(int(token) for token in ids) for name, ids in value.items()}
    return tuple(int(token) for token in value or ())


def _rule(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(sorted(str(name) for name in value))
