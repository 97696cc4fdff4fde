"""Reading a compiled program's text: loops, what crosses the network, what waits for later.

XLA's own cost analysis counts the body of a loop once; here everything counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"(?:called_computations|branch_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"= s(?:32|64)\[\]\S* constant\((\d+)\)")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
BETWEEN_SLICES = "between slices"
"""What `Collective.kind` calls a transfer over the data-centre network."""
_NO_BYTES = ("token", "opaque")
# The memory space of what is in the host's memory, on a GPU and on a TPU.
_HOST = "S(5)"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its result's type as written, its opcode and its whole line."""

    name: str
    type: str
    opcode: str
    line: str


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: ``bf16[8,128]``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes, 4-bit numbers counted as half a byte.

        >>> Array("s4", (3, 2)).nbytes, Array("bf16", (8,)).nbytes
        (3.0, 16.0)
        """
        bits = re.search(r"\d+", self.dtype)
        return self.size * (int(bits.group()) if bits else 8) / 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer, over a whole step.

    Attributes:
      kind: ``all-gather`` and others; `BETWEEN_SLICES` for all that leaves a slice.
      array: the largest array that one of them delivers.
      times: how often they run.
      payload_bytes: what they deliver to a device in all.
      sent_bytes: what a device sends for it in all, by a ring.
    """

    kind: str
    array: Array
    times: int
    payload_bytes: float
    sent_bytes: float


def arrays_of(type_: str) -> list[Array]:
    """Returns the arrays of a type, several for a tuple.

    >>> arrays_of("(bf16[2,4]{1,0:T(8,128)(2,1)}, s4[8]{0})")
    [Array(dtype='bf16', shape=(2, 4)), Array(dtype='s4', shape=(8,))]
    """
    return [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(type_)
        if dtype not in _NO_BYTES
    ]


class Module:
    """A compiled program.

    Args:
      text: ``compiled.as_text()``.

    Attributes:
      computations: instructions by the name of their computation.
      runs: how often each computation runs in a step.
      trips: of the innermost loop around each computation, 1 outside any.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry = name = ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                name = head[2]
                self.computations[name] = []
                entry = name if head[1] else entry
            elif name and (found := _INSTRUCTION.match(line)):
                self.computations[name].append(Instruction(found[1], found[2], found[3], line))
        self._fused: set[str] = set()
        self.runs: dict[str, int] = {}
        self.trips: dict[str, int] = {}
        self._visit(entry, 1, 1)

    def _visit(self, name: str, runs: int, trips: int) -> None:
        self.runs[name] = self.runs.get(name, 0) + runs
        self.trips[name] = max(self.trips.get(name, 1), trips)
        for instruction in self.computations.get(name, ()):
            times = self._trips(instruction) if instruction.opcode == "while" else 1
            inner = times if instruction.opcode == "while" else trips
            for called in _called(instruction.line):
                if instruction.opcode == "fusion":
                    self._fused.add(called)
                self._visit(called, runs * times, inner)

    def _trips(self, loop: Instruction) -> int:
        if known := _TRIPS.search(loop.line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
        lines = self.computations.get(condition[1], ()) if condition else ()
        bounds = [int(n) for i in lines for n in _BOUND.findall(i.line)]
        return max(bounds, default=1)

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """Yields every instruction that runs, with the name of its computation."""
        for name in self.runs:
            for instruction in self.computations.get(name, ()):
                yield name, instruction

    def collectives(self) -> list[Collective]:
        """Returns what crosses the network in a step, by kind and dtype, the largest first."""
        # A transfer that was fused with arithmetic has copies, all on its channel. Without that a
        # channel says nothing: every transfer of a `shard_map` has the same.
        channels: dict[str, tuple[str, list[Array], int, int]] = {}
        for where, found in self.instructions():
            kind = found.opcode.removesuffix("-start")
            slow = kind == "send" and "xla_megascale_runtime" in found.line
            if kind not in _COLLECTIVES and not slow:
                continue
            channel = re.search(r"channel_id=(\d+)", found.line)
            delivered = arrays_of(found.type)
            key = f"{where} {found.name}"
            if channel and where in self._fused:
                key = f"{kind} {channel[1]} {delivered}"
            if slow:
                kind, delivered = BETWEEN_SLICES, [max(delivered, key=lambda x: x.nbytes)]
            if found.opcode.endswith("-start"):  # operands, results and tokens in one tuple
                whole = [max(delivered, key=lambda x: x.nbytes)]
                delivered = delivered[len(delivered) // 2 :] if kind == "all-to-all" else whole
            runs = max(self.runs[where], channels.get(key, (0, 0, 0, 0))[2])
            channels[key] = (kind, delivered, runs, _group_size(found.line))
        table: dict[tuple[str, str], list[tuple[list[Array], int, int]]] = {}
        for kind, delivered, runs, group in channels.values():
            for dtype in dict.fromkeys(array.dtype for array in delivered):
                arrays = [array for array in delivered if array.dtype == dtype]
                table.setdefault((kind, dtype), []).append((arrays, runs, group))
        return sorted(
            (_sum(kind, rows) for (kind, _), rows in table.items()), key=lambda c: -c.sent_bytes
        )

    def saved_for_backward(self) -> float:
        """Returns the device's bytes that loops of the forward pass stack up for the backward."""
        stacked: dict[tuple[str, str], float] = {}
        for where, found in self.instructions():
            if found.opcode != "dynamic-update-slice" or "transpose(" in found.line:
                continue
            if _HOST in found.type:
                continue
            for array in arrays_of(found.type)[:1]:
                if self.trips[where] > 1 and array.shape[:1] == (self.trips[where],):
                    stacked[where, found.name] = array.nbytes
        return sum(stacked.values())


def _called(line: str) -> list[str]:
    many = ",".join(_CALLED_MANY.findall(line))
    return _CALLED.findall(line) + [n.strip().lstrip("%") for n in many.split(",") if n.strip()]


def _group_size(line: str) -> int:
    """Devices that one transfer is between, 0 for all of them (the line does not say)."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", named[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([\w.]+)'", named[2]))
    return 0


def _sum(kind: str, rows: list[tuple[list[Array], int, int]]) -> Collective:
    sizes = [sum(array.nbytes for array in arrays) * runs for arrays, runs, _ in rows]
    shares = [_share_sent(kind, group) for *_, group in rows]
    sent = sum(size * share for size, share in zip(sizes, shares, strict=True))
    largest = max((array for arrays, *_ in rows for array in arrays), key=lambda x: x.nbytes)
    return Collective(kind, largest, sum(runs for _, runs, _ in rows), sum(sizes), sent)


def _share_sent(kind: str, group: int) -> float:
    """What a device sends for each byte of the result, by a ring."""
    part = (group - 1) / group if group else 1.0
    return {
        "all-gather": part,
        "all-reduce": 2 * part,
        "reduce-scatter": part * max(group, 1),
        "all-to-all": part,
    }.get(kind, 1.0)
