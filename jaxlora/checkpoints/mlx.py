"""Adapters of mlx-lm, seen as PEFT's.

From mlx-lm's sources (mlx_lm/tuner/lora.py, dora.py, utils.py and mlx_lm/lora.py): a run saves
``adapters.safetensors`` and, as adapter_config.json, all its arguments. `LoRALinear` computes
``x W^T + scale * (x lora_a) lora_b`` with lora_a ``[in, r]`` and lora_b ``[r, out]``: PEFT's,
transposed. `DoRALinear` has the magnitudes as ``m``. `linear_to_lora_layers` adapts the last
``num_layers`` layers (``lora_layers`` in older files; 0 or less means all). Older releases had an
``alpha`` beside the scale (16 and 10, where later ones have a scale of 20) and multiplied by
``scale * (alpha / r)``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.checkpoints.tensor_view import Source, TensorView
from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.errors import UserError
from jaxlora.lora.config import LoraConfig

STEM = "adapters"
_PARTS = {
    "lora_a": Source("lora_A.weight", np.transpose, transposes=True),
    "lora_b": Source("lora_B.weight", np.transpose, transposes=True),
    "m": Source("lora_magnitude_vector"),
}


def is_mlx(content: Mapping[str, Any]) -> bool:
    """Whether adapter_config.json was written by mlx-lm."""
    return "lora_parameters" in content or "fine_tune_type" in content


def open_mlx(folder: Path, content: Mapping[str, Any]) -> tuple[LoraConfig, TensorView]:
    """Returns the adapter's options and its tensors by PEFT's names.

    Args:
      folder: holds adapters.safetensors.
      content: of adapter_config.json.

    Raises:
      UserError: no LoRA or DoRA, damaged files, a tensor that is none of a linear layer's adapter.
    """
    kind = content.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(f"fine_tune_type: {kind!r} is no adapter; expected 'lora' or 'dora'.")
    options = content["lora_parameters"]
    rank = int(options["rank"])
    scale = float(options["scale"])
    if "alpha" in options:
        scale *= float(options["alpha"]) / rank
    files = TensorFiles(folder, STEM)
    sources, modules = {}, {}
    for name, info in files.info.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS or len(info.shape) > 2 or "embed_tokens" in module:
            raise UserError(
                f"{info.file}: {name} is no part of a linear layer's adapter; jaxlora imports "
                "those of mlx-lm (lora_a, lora_b, m), not experts', embeddings' or whole weights."
            )
        peft = _PARTS[part]
        target = f"base_model.model.{module}.{peft.name}"
        sources[target] = Source(name, peft.change, peft.transposes)
        modules[module] = None
    if not modules:
        raise UserError(f"{folder}: its {STEM}.safetensors is empty; train the adapter again.")
    config = LoraConfig(
        r=rank,
        alpha=scale * rank,
        dropout=float(options.get("dropout") or 0.0),
        target_modules=tuple(sorted(modules)),
        use_dora=kind == "dora",
    )
    return config, TensorView(files, sources)


def check_layers(content: Mapping[str, Any], held: Iterable[str], model: Iterable[str]) -> None:
    """Compares the layers in the file with those that mlx-lm trained: the last ones.

    Args:
      content: of adapter_config.json.
      held: module paths with an adapter in the file.
      model: module paths of the base model.

    Raises:
      UserError: another number of layers, or other layers.
    """
    count = content.get("num_layers", content.get("lora_layers"))
    found, layers = _layers(held), _layers(model)
    if not isinstance(count, int) or not found:
        return
    expected = layers[-count:] if count > 0 else layers
    if found != expected:
        raise UserError(
            f"num_layers: {count} means the last {len(expected)} of this base model's "
            f"{len(layers)} layers, but {STEM}.safetensors has layers {_span(found)}; is it the "
            "adapter of another base model?"
        )


def _layers(modules: Iterable[str]) -> list[int]:
    numbers = (re.search(r"\.layers\.(\d+)\.", module) for module in modules)
    return sorted({int(number[1]) for number in numbers if number})


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]} ({len(layers)} in all)"
