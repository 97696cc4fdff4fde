"""Memory of a compiled step: what the compiler planned, and what was in use."""

import dataclasses
import sys
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: weights, adapter, optimizer and batch.
      temporaries: what the step needs beside them, by the compiler.
      peak: highest use so far by the device; on a CPU, of the whole process. 0 where unknown.
    """

    arguments: int
    temporaries: int
    peak: int

    @property
    def planned(self) -> int:
        return self.arguments + self.temporaries


def measure_memory(compiled: Any) -> Memory:
    """Returns the memory of a compiled step, after it has run."""
    analysis = compiled.memory_analysis()
    arguments = int(getattr(analysis, "argument_size_in_bytes", 0))
    temporaries = int(getattr(analysis, "temp_size_in_bytes", 0))
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return Memory(arguments, temporaries, _process_peak())
    stats = device.memory_stats() or {}
    return Memory(arguments, temporaries, int(stats.get("peak_bytes_in_use", 0)))


def _process_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
