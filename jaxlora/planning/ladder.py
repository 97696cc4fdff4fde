"""`remat: auto`: the first policy of a ladder whose train step fits a device."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxlora.planning.hardware import Hardware, usable_bytes
from jaxlora.planning.report import size

# From most speed to least memory: on an H100, 8B LoRA in bfloat16, `matmuls` reached 14,430
# tokens/s, `attention` 12,626 and `full` 11,855 (benchmarks/README.md).
LADDER = ("none", "matmuls", "attention", "full")
# On a CPU what is cheap is as soon computed again as written and read: `matmuls` takes a half to
# three quarters of the scratch of `none`, at 0.97 (1M parameters) to 1.17 (110M, bfloat16) of
# its speed (benchmarks/LOG.md).
_CPU_LADDER = LADDER[1:]
# Of a device's memory. The compiler's figure was within 0.2 % of an H100's; the rest is for what
# runs beside the step, evaluation and copies. On a CPU that is Python, and other programs; there
# the figure was up to 7.3 % too low (docs/planning.md).
_SHARE_OF_HOST, _SHARE_OF_ACCELERATOR = 0.75, 0.95
# A formula was at worst 0.47 of what a compiler said: what it calls a quarter fits.
_SURELY = 0.25


@dataclasses.dataclass(frozen=True)
class Rung:
    """A policy that was looked at.

    Attributes:
      remat: its name.
      nbytes: what a step needs of one device; at least that where the method is ``formula`` and it
        was not taken; None where a compiler ran out of memory and did not say how much it wants.
      method: ``compiled`` or ``formula``.
    """

    remat: str
    nbytes: int | None
    method: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `auto` stands for.

    Attributes:
      rungs: what was looked at, from the top; the last is taken.
      room: bytes of one device that a step may take, 0 if unknown.
    """

    rungs: tuple[Rung, ...]
    room: int

    @property
    def remat(self) -> str:
        """The policy that is taken."""
        return self.rungs[-1].remat

    @property
    def words(self) -> str:
        """The policy and why, in one line.

        >>> Choice((Rung("none", 3 << 30, "compiled"), Rung("matmuls", 1 << 30, "compiled")),
        ...     2 << 30).words
        'remat: auto takes matmuls: it needs 1.00 GiB of 2.00 GiB on each device (none 3.00 GiB)'
        """
        *others, taken = self.rungs
        if not self.room:
            return f"remat: auto takes {taken.remat}: the memory of the device is unknown"
        fits = taken.nbytes is not None and taken.nbytes <= self.room
        about = "about " if taken.method == "formula" else ""
        text = (
            f"remat: auto takes {taken.remat}{':' if fits else ', though'} it needs {about}"
            f"{_size(taken)} of {size(self.room)} on each device"
        )
        larger = ", ".join(
            f"{each.remat} {'over ' if each.method == 'formula' else ''}{_size(each)}"
            for each in others
        )
        return f"{text} ({larger})" if larger else text

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Choice":
        """Returns what `to_dict` gave.

        Raises:
          ValueError: it has another form, or names a policy that is not on the ladder.
        """
        try:
            rungs = tuple(Rung(**each) for each in values["rungs"])
            choice = cls(rungs, int(values["room"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no choice: {values!r}") from error
        if not rungs or any(each.remat not in LADDER for each in rungs):
            raise ValueError(f"no choice: {values!r}")
        return choice


def _size(rung: Rung) -> str:
    return "more than its compiler has" if rung.nbytes is None else size(rung.nbytes)


def ladder_of(platform: str) -> tuple[str, ...]:
    """Returns the policies that are worth having on a platform, the fastest first.

    >>> ladder_of("cpu"), ladder_of("tpu")[0]
    (('matmuls', 'attention', 'full'), 'none')
    """
    return _CPU_LADDER if platform == "cpu" else LADDER


def obvious(likely: Callable[[str], int], room: int, top: str) -> Choice | None:
    """Returns the choice where none has to be compiled to see it: the top, with room to spare.

    Args:
      likely: bytes of one device with a policy, by formula.
      room: from `room_bytes`.
      top: of `ladder_of`.
    """
    guess = likely(top)
    if room and guess > _SURELY * room:
        return None
    return Choice((Rung(top, guess, "formula"),), room)


def climb_down(
    least: Callable[[str], int],
    compiled: Callable[[str], int | None],
    room: int,
    policies: Sequence[str],
) -> Choice:
    """Returns the first policy that fits, or the last of all.

    Args:
      least: bytes of one device that a policy takes at the very least; what exceeds the room then
        is not compiled.
      compiled: bytes by the compiler, None for more than it has itself.
      room: from `room_bytes`.
      policies: from `ladder_of`.
    """
    rungs = []
    top, *_, last = policies
    if not room:
        return Choice((Rung(top, compiled(top), "compiled"),), room)
    for remat in policies:
        if (bound := least(remat)) > room and remat != last:
            rungs.append(Rung(remat, bound, "formula"))
            continue
        rungs.append(Rung(remat, nbytes := compiled(remat), "compiled"))
        if nbytes is not None and nbytes <= room:
            break
    return Choice(tuple(rungs), room)


def room_bytes(hardware: Hardware, here: Sequence[Any] = ()) -> int:
    """Returns the bytes of one device that a step may plan with, 0 if unknown.

    Args:
      hardware: of the device.
      here: the devices, if they are of this machine: then they are asked what JAX can have.
    """
    limit = usable_bytes(hardware)
    if hardware.platform == "cpu":  # all of them have the one memory of the host
        return int(limit * _SHARE_OF_HOST) // jax.local_device_count()
    if here:
        stats = getattr(here[0], "memory_stats", lambda: None)() or {}
        limit = int(stats.get("bytes_limit", limit))
    return int(limit * _SHARE_OF_ACCELERATOR)
