"""Data sheets: what a chip holds, computes and moves."""

import contextlib
import dataclasses
import os
from pathlib import Path

from jaxlora.core.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One chip.

    Attributes:
      name: for people.
      platform: JAX's word, ``tpu``, ``gpu`` or ``cpu``.
      memory_bytes: what programs can use of its memory.
      flops_per_s: dense bfloat16 peak; 0 where unknown.
      memory_bytes_per_s: peak bandwidth of its memory; 0 where unknown.
      link_bytes_per_s: what it can send over its links to other chips of its slice or machine at
        once, one way; 0 where unknown.
    """

    name: str
    platform: str
    memory_bytes: int
    flops_per_s: float = 0.0
    memory_bytes_per_s: float = 0.0
    link_bytes_per_s: float = 0.0


# TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e; links are the "interchip interconnect bandwidth",
# which counts both directions, halved. Usable memory is what libtpu's out-of-memory errors name.
# GPUs: NVIDIA's data sheets of the SXM versions (dense, without sparsity), NVLink halved likewise.
HARDWARE: dict[str, Hardware] = {
    "v5e": Hardware("TPU v5e", "tpu", int(15.75 * GIB), 197e12, 819e9, 100e9),
    "v5p": Hardware("TPU v5p", "tpu", int(95.74 * GIB), 459e12, 2765e9, 300e9),
    "v6e": Hardware("TPU v6e", "tpu", int(31.25 * GIB), 918e12, 1640e9, 200e9),
    "h100": Hardware("NVIDIA H100 SXM", "gpu", 84_942_979_072, 989e12, 3350e9, 450e9),
    "h200": Hardware("NVIDIA H200 SXM", "gpu", 150_754_820_096, 989e12, 4800e9, 450e9),
    "a100": Hardware("NVIDIA A100 80GB SXM", "gpu", 84_987_740_160, 312e12, 2039e9, 300e9),
}

# `device_kind` of JAX's devices.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
}
# What JAX takes of a GPU's memory unless it is told otherwise.
_GPU_SHARE, _SHARE = 0.75, "XLA_PYTHON_CLIENT_MEM_FRACTION"


def usable_bytes(hardware: Hardware) -> int:
    """Returns the bytes of one chip that JAX gives to a program.

    On a GPU that is a share, which the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION sets.

    Raises:
      UserError: it is no share.
    """
    if hardware.platform != "gpu":
        return hardware.memory_bytes
    text = os.environ.get(_SHARE) or str(_GPU_SHARE)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{_SHARE}: {text!r}; expected a share of a GPU's memory, such as 0.9.")
    return int(hardware.memory_bytes * share)


def hardware_of(device: object) -> Hardware:
    """Returns the data sheet of a device that is here; what it does not say is asked of it."""
    kind, platform = str(getattr(device, "device_kind", "")), str(getattr(device, "platform", ""))
    if kind in _KINDS:
        return HARDWARE[_KINDS[kind]]
    if platform == "cpu":
        return Hardware("CPU", "cpu", _host_bytes())
    stats = getattr(device, "memory_stats", lambda: None)() or {}
    return Hardware(kind, platform, int(stats.get("bytes_limit", 0)))


def _host_bytes() -> int:
    """Memory of this machine, or of the container that this is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(Path(file).read_text()))
    return min(limits)
