"""What becomes of a key that is not ours: read as another, without effect, or refused."""

from collections.abc import Mapping
from typing import Any

from jaxlora.config.keys import IMPLIED, MAPPED, NO_OP, REFUSED

INERT: Mapping[str, Any] = {
    "context_parallel_size": 1,
    "sequence_parallel_degree": 1,
    "expert_parallel_size": 1,
}
"""Key: live-looking value that asks for nothing."""
# Keys that ask for something when false.
_ASK_WHEN_FALSE = frozenset(
    ["peft_autocast_adapter_dtype", "save_safetensors", "tokenizer_save_jinja_files"]
)

_SPEED = NO_OP["torch_compile"]
_BALANCE = "the loss that balances the load of experts is not added"
_CONFIG = {
    "output_router_logits": _BALANCE,
    "router_aux_loss_coef": _BALANCE,
    "use_cache": "nothing is generated while training",
}
HARMLESS: Mapping[str, Mapping[str, str]] = {
    "plugins": {
        "axolotl.integrations.cut_cross_entropy": _SPEED,
        "axolotl.integrations.liger": _SPEED,
        "axolotl.integrations.kernels": _SPEED,
        "axolotl.integrations.expert_parallel": _SPEED,
        "axolotl.integrations.swanlab": NO_OP["use_swanlab"],
    },
    "model_config": _CONFIG,
    "overrides_of_model_config": _CONFIG,
    "model_quantization_config": {"Mxfp4Config": NO_OP["gptq"]},
    "model_quantization_config_kwargs": {"dequantize": NO_OP["gptq"]},
    "optim_args": {"bf16_stochastic_round": NO_OP["peft_autocast_adapter_dtype"]},
}
"""Refused key: part of its value: why that part changes nothing."""


def is_live(key: str, value: Any) -> bool:
    """Returns whether `value` asks for anything.

    >>> is_live("qat", False), is_live("rl", "dpo"), is_live("context_parallel_size", 1)
    (False, True, False)
    """
    if value is False:
        return key in _ASK_WHEN_FALSE
    inert = INERT.get(key)
    return bool(value) and not (value == inert and type(value) is type(inert))


def refusal(key: str, value: Any) -> str | None:
    """Returns why `key: value` is an error, or None.

    >>> refusal("optim_args", {"bf16_stochastic_round": True, "eps": 1})
    'eps: not available; leave it out'
    """
    if key not in REFUSED or not is_live(key, value):
        return None
    if key not in HARMLESS:
        return REFUSED[key]
    bad = next((part for part in _parts(value) if _harmless(key, part) is None), None)
    return None if bad is None else f"{bad}: {REFUSED[key]}"


def no_effect(key: str, value: Any) -> str | None:
    """Returns why `key: value`, which is no key of ours and not refused, changes nothing.

    >>> no_effect("strict", False)
    'it asks for nothing'
    """
    if key in MAPPED or (key in IMPLIED and is_live(key, value)):
        return None
    if not is_live(key, value):
        return "it asks for nothing"
    if key in NO_OP:
        return NO_OP[key]
    reasons = dict.fromkeys(_harmless(key, part) or "" for part in _parts(value))
    return "; ".join(filter(None, reasons))


def _parts(value: Any) -> list[str]:
    """Returns the keys of a mapping, of text such as ``a=1,b=2``, or the items of a list."""
    if isinstance(value, str):
        value = value.replace(" ", "").split(",")
    if isinstance(value, Mapping | list | tuple):
        return [str(part).partition("=")[0] for part in value if part]
    return [str(value)]


def _harmless(key: str, part: str) -> str | None:
    return next(
        (why for name, why in HARMLESS[key].items() if f"{part}.".startswith(f"{name}.")), None
    )
