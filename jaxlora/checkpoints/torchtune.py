"""Adapters of torchtune in its own key names, seen as PEFT's.

From torchtune's sources (torchtune/models/convert_weights.py): the names below, and the rows of q
and k in the order of interleaved rotary embeddings, as Meta publishes LLaMA: `hf_to_tune` takes
Hugging Face's ``[heads, 2, head_dim / 2]`` to ``[heads, head_dim / 2, 2]``, and
`tune_to_peft_adapter_weights` takes lora_b (not lora_a, whose rows are ranks) back. A magnitude of
DoRA has one number a row, so it is reordered alike. Qwen's models keep Hugging Face's order there
(torchtune/models/qwen2/_convert_weights.py); they are refused rather than guessed at.

torchtune's Hugging Face checkpointer also writes ``adapter_model.safetensors`` in PEFT's names,
which needs nothing of this.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxlora.checkpoints.tensor_view import Source, Tensors, TensorView
from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig
from jaxlora.models.parameters import ParamSpec

_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_PARTS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_NAME = re.compile(
    rf"(?:layers\.(?P<layer>\d+)\.(?P<module>{'|'.join(_MODULES)})|output)"
    rf"\.(?P<part>{'|'.join(_PARTS)})"
)
_ROTATED = ("attn.q_proj", "attn.k_proj")


def is_torchtune(names: Iterable[str]) -> bool:
    """Whether these are torchtune's own tensor names.

    >>> is_torchtune(["layers.0.attn.q_proj.lora_a.weight"])
    True
    >>> is_torchtune(["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    False
    """
    return any(_NAME.fullmatch(name) for name in names)


def open_torchtune(
    files: Tensors, content: Mapping[str, Any], head_dim: int | None
) -> tuple[LoraConfig, TensorView]:
    """Returns the adapter's options and its tensors by PEFT's names, in Hugging Face's row order.

    Args:
      files: the tensors.
      content: of adapter_config.json; of it only `r` and `lora_alpha` count.
      head_dim: size of the base model's attention heads; None if no values will be read.

    Raises:
      UserError: a tensor of another name.
    """
    sources, modules, dora = {}, {}, False
    to_halves = functools.partial(interleaved_to_halves, head_dim=head_dim or 2)
    for name, info in files.info.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise UserError(
                f"{info.file}: {name} is none of torchtune's adapter tensors for attention, mlp or "
                "output; expected names such as layers.0.attn.q_proj.lora_a.weight."
            )
        layer, module, part = found["layer"], found["module"], found["part"]
        path = "lm_head" if layer is None else f"model.layers.{layer}.{_MODULES[module]}"
        rotated = module in _ROTATED and part != "lora_a.weight"
        sources[f"base_model.model.{path}.{_PARTS[part]}"] = Source(
            name, to_halves if rotated else None
        )
        modules[path] = None
        dora = dora or part == "magnitude"
    config = LoraConfig(
        r=int(content["r"]),
        alpha=float(content["lora_alpha"]),
        target_modules=tuple(sorted(modules)),
        use_dora=dora,
    )
    return config, TensorView(files, sources)


def check_model(specs: Mapping[str, ParamSpec]) -> None:
    """Refuses base models whose rows torchtune may not reorder: those of biased or normed queries.

    Raises:
      UserError: such a model.
    """
    signs = ("q_proj", "q_norm")
    modules = [
        m for spec in specs.values() if spec.kind in ("bias", "norm") for m in spec.modules()
    ]
    if any(module.endswith(signs) for module in modules):
        raise UserError(
            "adapters in torchtune's own names are read for LLaMA, Mistral and Gemma models only; "
            "use the adapter_model.safetensors that torchtune writes in PEFT's names."
        )


def interleaved_to_halves(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of each head from ``(x0, y0, x1, y1)`` to ``(x0, x1, y0, y1)``.

    >>> interleaved_to_halves(np.arange(8), 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    split = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def halves_to_interleaved(values: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `interleaved_to_halves`.

    >>> halves_to_interleaved(np.array([0, 2, 1, 3]), 4).tolist()
    [0, 1, 2, 3]
    """
    split = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
