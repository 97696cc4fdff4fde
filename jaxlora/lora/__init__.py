"""F1: the functional LoRA transform, on any tree of weights.

`init` makes an adapter for the leaves a rule selects, `apply` puts `LoraArray` leaves in their
place, `merge` folds them in, `wrap` lets a model that knows nothing of jaxlora train an adapter.
"""

from jaxlora.lora.config import LoraConfig
from jaxlora.lora.targets import Target, match, targets_of_tree
from jaxlora.lora.transform import apply, count, init, merge, unmerge
from jaxlora.lora.wrap import wrap

__all__ = [
    "LoraConfig",
    "Target",
    "apply",
    "count",
    "init",
    "match",
    "merge",
    "targets_of_tree",
    "unmerge",
    "wrap",
]
