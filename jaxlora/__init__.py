"""jaxlora: fine-tune LLMs with LoRA and QLoRA in JAX/Flax; the adapter loads in PEFT.

>>> import jaxlora
>>> result = jaxlora.train("configs/quickstart.yml")  # doctest: +SKIP
>>> jaxlora.generate(result.output_dir, "Hello!")  # doctest: +SKIP

Verbs: `train`, `evaluate`, `generate`, `load`, `merge`, `export`, `verify`, `preprocess`,
`inspect`, `plan`.
The functional LoRA transform for any Flax model is `jaxlora.lora`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlora.core.errors import UserError
from jaxlora.core.version import __version__

if TYPE_CHECKING:
    from jaxlora import lora
    from jaxlora.api import (
        Config,
        QuantSpec,
        SamplingOptions,
        assets,
        classify,
        evaluate,
        export,
        generate,
        inspect,
        load,
        load_config,
        merge,
        merge_differences,
        plan,
        preprocess,
        train,
        verify,
    )

__all__ = [
    "Config",
    "QuantSpec",
    "SamplingOptions",
    "UserError",
    "__version__",
    "assets",
    "classify",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "load_config",
    "lora",
    "merge",
    "merge_differences",
    "plan",
    "preprocess",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Imported at first use: `jaxlora --help` and `jaxlora.lora` need none of the programs.
    if name == "lora":
        return importlib.import_module("jaxlora.lora")
    if name in __all__:
        return getattr(importlib.import_module("jaxlora.api"), name)
    raise AttributeError(f"module 'jaxlora' has no attribute {name!r}")
