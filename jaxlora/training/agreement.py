"""What the processes of one run must have in common, compared before anything is read."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

from jaxlora.config.schema import Config
from jaxlora.core.version import __version__
from jaxlora.parallel import processes
from jaxlora.training.setup import Plan

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Each process may have its own copy of these files, elsewhere.
_OWN = ("dataset_prepared_path",)


def check_start(config: Config) -> None:
    """Compares configuration, code, versions and devices, in this order.

    Raises:
      UserError: on every process, naming the first that differs.
    """
    if processes.count() == 1:
        return
    processes.require_same(config.model_dump(mode="json", exclude={"foreign", *_OWN}))
    versions = {f"version of {name}": version(name) for name in _PACKAGES}
    code = {"jaxlora": __version__, "code of jaxlora": code_digest()}
    # Before the devices: those of other versions may not find each other.
    processes.require_same({**code, "python": platform.python_version(), **versions})
    kinds = sorted({device.device_kind for device in jax.local_devices()})
    processes.require_same(
        {"devices of a process": jax.local_device_count(), "kind of device": kinds}
    )


def check_plan(plan: Plan) -> None:
    """Compares the base model and the data.

    Raises:
      UserError: as `check_start`.
    """
    held_out = plan.eval_batches and plan.eval_batches.steps_per_epoch
    processes.require_same(
        {
            "weights of base_model": plan.model.fingerprint,
            "datasets (tokens and their order)": plan.data.fingerprint,
            "steps": plan.total_steps,
            "batches of held-out data": held_out,
        }
    )


@cache
def code_digest() -> str:
    """Returns a digest of this package's sources."""
    total = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]
