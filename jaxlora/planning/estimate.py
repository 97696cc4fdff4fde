"""What a plan says: memory of one device, traffic, arithmetic, time; as data."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlora.planning.hardware import Hardware
from jaxlora.planning.hlo import BETWEEN_SLICES


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs.

    Attributes:
      weights: frozen base.
      trained: adapter, or trained weights.
      optimizer: its state.
      batch: tokens and their like.
      activations: what the forward pass keeps for the backward pass; part of the temporaries.
      gradients: of what trains; part of the temporaries.
      workspace: the rest of the temporaries: logits, unpacked weights, what crosses the network.
      program: the compiled code.
      padding: what the device's layout of the arguments adds to their numbers.
    """

    weights: int
    trained: int
    optimizer: int
    batch: int
    activations: int
    gradients: int
    workspace: int
    program: int = 0
    padding: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    @property
    def least(self) -> int:
        """What no compiler saves, where the figures are a formula's."""
        return self.total - self.gradients - self.workspace

    @property
    def temporaries(self) -> int:
        """What lives only during a step."""
        return self.activations + self.gradients + self.workspace


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Transfers of one kind and dtype between devices, over a step.

    Attributes:
      times: how often.
      payload_bytes: what they deliver to a device.
      sent_bytes: what a device sends.
    """

    kind: str
    dtype: str
    times: int
    payload_bytes: float
    sent_bytes: float


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a configuration.

    Attributes:
      keys: what to set.
      price: what it costs.
      saves_bytes: of one device, by formula.
      enough: whether with it, and those before it, the run fits.
    """

    keys: dict[str, Any]
    price: str
    saves_bytes: int
    enough: bool

    @property
    def words(self) -> str:
        """The keys as overrides of the command line."""
        return " ".join(f"--{key}={str(value).lower()}" for key, value in self.keys.items())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A plan.

    Attributes:
      topology: as asked for.
      hardware: one device of it.
      devices: how many.
      mesh: devices along each axis.
      method: ``compiled`` by XLA, or ``formula``.
      memory: of one device; None where it did not compile for want of memory and XLA does not say
        how much it wants.
      limit_bytes: what a program can have of it, 0 if unknown.
      traffic: between devices; empty where a formula does not know.
      tokens: of a step, over all devices.
      model_flops, executed_flops, wasted_flops: of a step, over all devices; see `Flops`.
      compile_s: how long it took.
      rows, accumulation, length: rows of a micro-batch on one device, micro-batches of a step,
        tokens of a row.
      remat: what the backward pass recomputes.
      base: how the frozen weights are stored.
      peak_bytes: the compiler's own figure of the peak, where it has one.
      listed_bytes: `memory.total`, were all temporaries that the compiler lists there at once; 0
        where it lists none.
      host_bytes: what the step keeps in the host's memory for the device (`remat: offload`).
      weight_passes: how often a micro-batch reads the weights.
      remat_choice: what `remat: auto` took and why, if it was asked.
      changes: what to change where it does not fit, the cheapest first.
    """

    topology: str
    hardware: Hardware
    devices: int
    mesh: dict[str, int]
    method: str
    memory: Memory
    limit_bytes: int
    traffic: tuple[Traffic, ...]
    tokens: int
    model_flops: float
    executed_flops: float
    compile_s: float
    rows: int
    accumulation: int
    length: int
    remat: str
    base: str
    peak_bytes: int = 0
    listed_bytes: int = 0
    host_bytes: int = 0
    weight_passes: int = 3
    wasted_flops: float = 0.0
    remat_choice: str = ""
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a device has room for it; true where its room is unknown."""
        return not self.limit_bytes or self.memory.total <= self.limit_bytes

    @property
    def spare_bytes(self) -> int:
        """Room that is left, negative where it does not fit."""
        return self.limit_bytes - self.memory.total

    def limits_s(self) -> dict[str, float]:
        """Returns the least seconds of a step by each of three limits that the hardware is known
        for: ``compute``, ``memory``, ``network``."""
        chip, limits = self.hardware, {}
        if chip.flops_per_s:
            limits["compute"] = self.executed_flops / self.devices / chip.flops_per_s
        if chip.memory_bytes_per_s:
            gathered = self.memory.weights * self.mesh.get("fsdp", 1)
            moved = self.weight_passes * self.accumulation * gathered
            moved += 2 * self.accumulation * self.memory.activations
            moved += 2 * (self.memory.trained + self.memory.optimizer)
            limits["memory"] = moved / chip.memory_bytes_per_s
        if chip.link_bytes_per_s and self.devices > 1 and self.traffic:
            # Nobody says how fast the network between slices is.
            sent = sum(e.sent_bytes for e in self.traffic if e.kind != BETWEEN_SLICES)
            limits["network"] = sent / chip.link_bytes_per_s
        return limits

    def tokens_per_s(self, efficiency: float) -> float:
        """Returns tokens a second of all devices at a share of the limit; 0 where unknown."""
        limits = self.limits_s()
        return efficiency * self.tokens / max(limits.values()) if limits else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in JSON's types, with what follows from it."""
        own = dataclasses.asdict(self)
        own["memory"] |= {"total": self.memory.total, "temporaries": self.memory.temporaries}
        return own | {
            "fits": self.fits,
            "spare_bytes": self.spare_bytes,
            "limits_s": self.limits_s(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Estimate":
        """Returns what `to_dict` gave."""
        fields = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in values.items() if name in fields}
        memory = {field.name: own["memory"][field.name] for field in dataclasses.fields(Memory)}
        traffic = tuple(Traffic(**each) for each in own["traffic"])
        return cls(
            **own
            | {
                "hardware": Hardware(**own["hardware"]),
                "memory": Memory(**memory),
                "traffic": traffic,
                "changes": tuple(Change(**each) for each in own["changes"]),
            }
        )


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of one device's share of a tree of shapes with shardings."""
    return sum(_share(leaf) for leaf in jax.tree.leaves(tree))


def _share(leaf: Any) -> int:
    shape: Sequence[int] = leaf.sharding.shard_shape(leaf.shape)
    bits = 4 if "int4" in str(leaf.dtype) else 8 * np.dtype(leaf.dtype).itemsize
    return math.ceil(math.prod(shape) * bits / 8)
