"""Accelerators by name: how many chips, on how many machines, and what each cloud calls them."""

import dataclasses
import math
import re
from collections.abc import Mapping

from jaxlora.core.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class _Generation:
    """What Google calls one generation of TPU.

    Attributes:
      prefix: of an accelerator type; a type counts `per_chip` units a chip.
      runtime: image of a Cloud TPU VM.
      label: of a GKE node.
      flat: chips form a plane of which one machine can hold eight; else a cube, four a machine.
    """

    prefix: str
    per_chip: int
    runtime: str
    label: str
    flat: bool


_TPUS: Mapping[str, _Generation] = {
    "v4": _Generation("v4-", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", False),
    "v5e": _Generation("v5litepod-", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", True),
    "v5p": _Generation("v5p-", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", False),
    "v6e": _Generation("v6e-", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", True),
}
# GPU: its label on GKE and its name in SkyPilot.
_GPUS: Mapping[str, tuple[str, str]] = {
    "a100": ("nvidia-a100-80gb", "A100-80GB"),  # as in `jaxlora plan`
    "a100-40gb": ("nvidia-tesla-a100", "A100"),
    "h100": ("nvidia-h100-80gb", "H100"),
    "h200": ("nvidia-h200-141gb", "H200"),
    "l4": ("nvidia-l4", "L4"),
}
_EXPECTED = "expected such as v5e:4x4, v5p:2x2x2 or h100:8"
_WRITTEN = re.compile(r"(?P<kind>[a-z0-9-]+):(?P<shape>\d{1,4}(x\d{1,4}){0,2})")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind.

    Attributes:
      kind: such as v5e or h100.
      shape: chips along each side of a TPU slice; GPUs of one machine.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        return self.kind in _TPUS

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        """Chips that one machine sees.

        >>> parse("v5e:2x4").chips_per_host, parse("v5e:4x4").chips_per_host
        (8, 4)
        """
        if not self.is_tpu:
            return self.chips
        largest = 8 if _TPUS[self.kind].flat else 4
        return self.chips if self.chips <= largest else 4

    @property
    def hosts(self) -> int:
        """Machines of a TPU slice; 1 for GPUs, whose machines `--nodes` counts."""
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """The name of a TPU slice in gcloud and SkyPilot.

        >>> parse("v5e:4x4").accelerator_type, parse("v5p:2x2x1").accelerator_type
        ('v5litepod-16', 'v5p-8')
        """
        generation = _TPUS[self.kind]
        return f"{generation.prefix}{self.chips * generation.per_chip}"

    @property
    def runtime(self) -> str:
        """Image of a Cloud TPU VM."""
        return _TPUS[self.kind].runtime

    @property
    def gke_labels(self) -> dict[str, str]:
        """Labels of the GKE nodes that have it."""
        if not self.is_tpu:
            return {"cloud.google.com/gke-accelerator": _GPUS[self.kind][0]}
        return {
            "cloud.google.com/gke-tpu-accelerator": _TPUS[self.kind].label,
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, self.shape)),
        }

    @property
    def sky_name(self) -> str:
        """What SkyPilot calls it."""
        if self.is_tpu:
            return f"tpu-{self.accelerator_type}"
        return f"{_GPUS[self.kind][1]}:{self.chips}"


def parse(text: str) -> Topology:
    """Reads ``kind:shape``.

    Raises:
      UserError: an unknown kind, or a slice that does not exist.

    >>> parse("v5e:4x4")
    Topology(kind='v5e', shape=(4, 4))
    """
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise UserError(f"--topology: {text!r} is not understood; {_EXPECTED}.")
    kind, shape = match["kind"], tuple(map(int, match["shape"].split("x")))
    if kind not in _TPUS and kind not in _GPUS:
        near = did_you_mean(kind, [*_TPUS, *_GPUS])
        raise UserError(f"--topology: {kind} is not known; {_EXPECTED}.{near}")
    if kind in _GPUS and (len(shape) != 1 or not 1 <= shape[0] <= 16):
        raise UserError(f"--topology: {text}: give the GPUs of one machine, such as {kind}:8.")
    if kind in _TPUS:
        flat = _TPUS[kind].flat
        known = _slices(flat)
        if shape not in known:
            listed = ", ".join("x".join(map(str, each)) for each in known)
            raise UserError(f"--topology: {text}: {kind} has no such slice; expected {listed}.")
    return Topology(kind, shape)


def _slices(flat: bool) -> list[tuple[int, ...]]:
    """Shapes of the slices that Google documents (larger cubes can be had on request)."""
    if flat:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    return [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)]
