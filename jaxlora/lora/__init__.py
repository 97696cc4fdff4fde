"""F1: the functional LoRA transform, on any tree of weights.

`init` makes an adapter for the leaves a rule selects, `apply` puts `LoraArray` leaves in their
place, `merge` folds them in, `wrap` lets a model that knows nothing of jaxlora train an adapter.
"""

from jaxlora.lora.biases import with_biases
from jaxlora.lora.config import LoraConfig
from jaxlora.lora.initializers import changes_base
from jaxlora.lora.parameters import match_parameters
from jaxlora.lora.splitting import Splitter, as_difference, split_tree
from jaxlora.lora.targets import Target, match, targets_of_tree
from jaxlora.lora.transform import apply, count, init, merge, unmerge, with_magnitudes
from jaxlora.lora.wrap import wrap

__all__ = [
    "LoraConfig",
    "Splitter",
    "Target",
    "apply",
    "as_difference",
    "changes_base",
    "count",
    "init",
    "match",
    "match_parameters",
    "merge",
    "split_tree",
    "targets_of_tree",
    "unmerge",
    "with_biases",
    "with_magnitudes",
    "wrap",
]
