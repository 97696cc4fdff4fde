"""The machine a benchmark ran on, and whether it was quiet enough to measure anything."""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.core.errors import UserError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "bitsandbytes")


def check_quiet(allow_busy: bool) -> None:
    """Checks that no other program competes for the cores.

    Raises:
      UserError: a load average above the number of cores, without `allow_busy`.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores and not allow_busy:
        raise UserError(
            f"load average {load:.1f} on {cores} cores: times measured now would be those of the "
            "other programs; wait, or pass --allow-busy (the result records the load)."
        )


def load_now() -> dict[str, float | list[float]]:
    """Returns the load averages (1, 5, 15 minutes) and the idle share of the last second."""
    before, started = _idle_s(), time.monotonic()
    time.sleep(1.0)
    share = (_idle_s() - before) / (time.monotonic() - started) / (os.cpu_count() or 1)
    return {
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "idle_share": round(min(share, 1.0), 3),
    }


def _idle_s() -> float:
    ticks = int(Path("/proc/stat").read_text().splitlines()[0].split()[4])
    return ticks / os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, object]:
    """Returns hardware, versions and commit."""
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "hardware": f"{_cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "versions": {"python": platform.python_version()} | versions,
        "commit": _git("rev-parse", "--short", "HEAD"),
        # The benchmarks' own files do not count: a result is written before it is committed.
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "jaxlora")),
        "malloc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(data: Path | None = None) -> str:
    """Returns the command line of this program; the folder of its data, `data`, is called PATH."""
    program, *arguments = sys.argv
    named = ["PATH" if data is not None and each == str(data) else each for each in arguments]
    return shlex.join(["python", f"benchmarks/{Path(program).name}", *named])


def run(
    name: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    *,
    timed: bool = True,
) -> None:
    """The command of a benchmark: writes what `measure` found and prints it as a table.

    A busy machine is refused where something is timed; the folder ``--data`` is called PATH.
    """
    if timed:
        parser.add_argument("--allow-busy", action="store_true", help="measure on a busy machine")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": command(getattr(options, "data", None)),
    }
    try:
        if timed:
            check_quiet(options.allow_busy)
        result |= {**describe(), "load_before": load_now(), **measure(options)}
    except UserError as error:
        sys.exit(str(error))
    result["load_after"] = load_now()
    if not options.no_write:
        write(name, result)
    print(table(result))


def write(name: str, result: dict[str, Any]) -> None:
    """Writes one benchmark's result, under the date in it."""
    target = RESULTS / f"{result['date']}-{name}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*command: str) -> str:
    folder = Path(__file__).parent.parent
    done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    return done.stdout.strip()


def measured_peak_flops(dtype: str = "float32") -> float:
    """Returns the FLOP/s of the best of ten products of 2048 x 2048 matrices, in float32.

    XLA on a CPU makes both factors of a product in bfloat16 wide first, which is half as fast.
    """
    size = 2048
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    product(matrix, matrix).block_until_ready()
    best_s = float("inf")
    for _ in range(10):
        started = time.monotonic()
        product(matrix, matrix).block_until_ready()
        best_s = min(best_s, time.monotonic() - started)
    return 2 * size**3 / best_s
