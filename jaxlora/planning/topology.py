"""Devices to plan for, which need not be here."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.planning.gpu_target import gpu_devices
from jaxlora.planning.hardware import HARDWARE, Hardware, hardware_of

_EXAMPLES = "v5e:4x4, v5p:2x2x4, v6e:2x4, h100:8 or cpu"
_SHAPE = re.compile(r"\d+(x\d+){0,2}")
# What libtpu must be told where there is no TPU. The last: its lock would stop a second process.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """What to plan for.

    Attributes:
      text: as written.
      kind: key of `HARDWARE`, or ``cpu`` for this machine's devices.
      shape: chips along each axis of a slice; GPUs of all machines.
      slices: how many slices of a TPU, joined by the data-centre network.
    """

    text: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape) * self.slices

    @property
    def local(self) -> bool:
        """Whether it is the devices that this process has."""
        return self.text in ("cpu", "here")

    @property
    def hardware_platform(self) -> str:
        """JAX's word for its devices; ``cpu`` for what is here."""
        return HARDWARE[self.kind].platform if self.kind in HARDWARE else "cpu"

    @property
    def hardware(self) -> Hardware:
        """The data sheet of one device."""
        if self.kind == "cpu":
            import jax

            return hardware_of(jax.devices()[0])
        return HARDWARE[self.kind]


def parse(text: str | None) -> Topology:
    """Returns what a word such as ``v5e:4x4`` stands for; None: the devices of this machine.

    Raises:
      UserError: an unknown chip, or a shape that it does not come in.

    >>> parse("v5e:4x4").size, parse("2xv5e:4x4").size, parse("h100:8").shape
    (16, 32, (8,))
    """
    if text is None or text == "cpu":
        return Topology(text or "here", "cpu", ())
    several, one = re.fullmatch(r"(?:(\d+)x(?=[a-z]))?(.*)", text, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    kind, _, shape = one.partition(":")
    kinds = [*HARDWARE, "cpu"]
    if kind not in kinds or not _SHAPE.fullmatch(shape or "1"):
        raise UserError(
            f"--topology: {text!r} is unknown; expected a chip of {', '.join(kinds)} and how many, "
            f"e.g. {_EXAMPLES}.{did_you_mean(kind, kinds)}"
        )
    sizes = tuple(int(n) for n in (shape or "1").split("x"))
    flat = 1 if kind == "cpu" or HARDWARE[kind].platform == "gpu" else 3 if kind == "v5p" else 2
    if kind != "cpu" and HARDWARE[kind].platform == "tpu" and sizes == (1,):
        sizes = (1,) * flat
    if len(sizes) != flat or 0 in sizes:
        example = {1: f"{kind}:8", 2: f"{kind}:4x4", 3: f"{kind}:2x2x4"}[flat]
        raise UserError(f"--topology: {text}: expected {flat} numbers, e.g. {example}.")
    slices = int(several or 1)
    if slices < 1 or (several and (kind == "cpu" or HARDWARE[kind].platform != "tpu")):
        raise UserError(f"--topology: {text}: expected slices of a TPU, e.g. 2xv5e:4x4.")
    return Topology(text, kind, sizes, slices)


def environment(topology: Topology, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that compiles for a topology that is not here."""
    wanted = {"JAX_PLATFORMS": "cpu"}
    if topology.hardware_platform == "tpu":
        return {**inherited, **wanted, **_LIBTPU}
    # As many devices stand for GPUs where a formula must do.
    flags = f"--xla_force_host_platform_device_count={topology.size}"
    if topology.hardware_platform == "gpu" and has_compiler(topology):
        flags += " --xla_gpu_autotune_level=0"  # autotuning measures on a device
        wanted["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    wanted["XLA_FLAGS"] = f"{inherited.get('XLA_FLAGS', '')} {flags}".strip()
    return {**inherited, **wanted}


def devices_of(topology: Topology) -> Sequence[Any]:
    """Returns the devices, in a process with the `environment` of the topology.

    Raises:
      UserError: there is no such slice.
    """
    import jax
    from jax.experimental import topologies

    if topology.kind == "cpu":
        return jax.devices()
    if HARDWARE[topology.kind].platform == "gpu":
        return gpu_devices(topology.kind, topology.size)
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    # A host has four chips, or all of them if there are fewer.
    bounds = [*(min(n, 2) for n in topology.shape[:2]), 1]
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            chips_per_host_bounds=bounds,
            **({"num_slices": topology.slices} if topology.slices > 1 else {}),
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology: {topology.text}: no such slice ({reason}); e.g. {_EXAMPLES}."
        ) from error
    return described.devices


def has_compiler(topology: Topology) -> bool:
    """Returns whether the package that compiles for a topology is installed."""
    if topology.kind == "cpu":
        return True
    platform = HARDWARE[topology.kind].platform
    names = ["libtpu"] if platform == "tpu" else ["jax_cuda13_plugin", "jax_cuda12_plugin"]
    return any(importlib.util.find_spec(name) for name in names)
