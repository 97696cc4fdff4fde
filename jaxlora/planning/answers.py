"""What `remat: auto` found is kept: a file an answer, beside the cache of compiled programs."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from jaxlora.config.run_sections import TrainingKeys
from jaxlora.config.schema import Config
from jaxlora.config.sections import AdapterKeys, ModelKeys
from jaxlora.planning.ladder import Choice
from jaxlora.planning.program import Program
from jaxlora.remote.location import cache_root
from jaxlora.training.agreement import code_digest

# Numbers in the program, of which its memory does not depend. A key that is not named here makes
# another question, and a sweep over these asks the same one again.
_NUMBERS = {
    "learning_rate", "loraplus_lr_embedding", "cosine_min_lr_ratio", "cosine_constant_lr_ratio",
    "lr_scheduler", "lr_quadratic_warmup", "warmup_steps", "warmup_ratio", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "num_epochs", "max_steps", "seed", "lora_alpha",
    "batch_size", "gradient_accumulation_steps", "mlm_probability",
}  # fmt: skip
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")


def question(config: Config, program: Program, room: int, extra: Mapping[str, Any]) -> str:
    """Returns a digest of all that the answer depends on.

    Args:
      config: the run.
      program: of it, with any policy.
      room: bytes of one device that it may take.
      extra: what else the program depends on.
    """
    keys = {*ModelKeys.model_fields, *AdapterKeys.model_fields, *TrainingKeys.model_fields}
    device = program.shape.placement.mesh.devices.flat[0]
    arguments = (program.trainable, program.opt_state, program.frozen, program.batch)
    facts = {
        "keys": config.model_dump(mode="json", include=keys - _NUMBERS),
        "packed": config.sample_packing,
        "model": repr(program.shape.cfg),
        "arguments": [
            (jax.tree_util.keystr(path), str(x.shape), str(x.dtype), str(x.sharding))
            for path, x in jax.tree_util.tree_leaves_with_path(arguments)
        ],
        "device": (device.device_kind, getattr(device.client, "platform_version", "")),
        "room": room,
        "code": code_digest(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "settings": {name: os.environ.get(name, "") for name in _SETTINGS},
        "extra": dict(extra),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def recall(asked: str) -> Choice | None:
    """Returns the answer to a `question`; None if there is none that can be read."""
    try:
        return Choice.from_dict(json.loads((cache_root() / "remat" / f"{asked}.json").read_text()))
    except (OSError, ValueError):
        return None


def remember(asked: str, choice: Choice) -> None:
    """Keeps an answer. Its file appears whole or not at all; where it cannot, the next run asks."""
    folder = cache_root() / "remat"
    part = folder / f".{asked}.{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.write_text(json.dumps(choice.to_dict()))
        os.replace(part, folder / f"{asked}.json")
