"""Seconds from a command to what it says first: `--help`, and a training loss of the quickstart.

    python benchmarks/startup.py [--rounds 3] [--allow-busy]

Every run is a process of its own. A cold one has an empty cache (`JAXLORA_CACHE`: compiled programs
and tokens), a warm one that of the run before; both end when the line of the first step is there.
The quickstart measures its held-out loss and exact match before that line.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yml"
# What is timed in a run: the first line that begins so.
MARKS = {
    "data": "data:",
    "weights": "model:",
    "held-out loss": "held-out loss",
    "exact match": "held-out exact match",
    "first step": "step ",
}


def help_s() -> dict[str, float]:
    """Returns wall and CPU seconds of `jaxlora --help`."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([*_command(), "--help"], check=True, capture_output=True)
    wall, after = time.perf_counter() - started, os.times()
    spent = after.children_user + after.children_system
    return {"wall_s": wall, "cpu_s": spent - before.children_user - before.children_system}


def train_s(config: Path, cache: Path, *overrides: str) -> dict[str, float]:
    """Returns seconds from the start of `jaxlora train` to each of `MARKS`, and CPU seconds in all.

    Raises:
      RuntimeError: the command ended before it trained.
    """
    # What pip installs is compiled to byte code; of these sources the first run keeps it too.
    left_out = ("JAX_COMP", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    with tempfile.TemporaryDirectory() as output:
        process = subprocess.Popen(
            [*_command(), "train", str(config), f"--output_dir={output}/run", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**env, "JAX_PLATFORMS": "cpu", "JAXLORA_CACHE": str(cache)},
        )
        before, started = os.times(), time.perf_counter()
        found: dict[str, float] = {}
        assert process.stdout is not None
        try:
            for line in process.stdout:
                for name, mark in MARKS.items():
                    if line.startswith(mark):
                        found.setdefault(name, time.perf_counter() - started)
                if "first step" in found:
                    break
            else:
                raise RuntimeError("jaxlora train ended before its first step")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        after = os.times()
    spent = after.children_user + after.children_system
    return found | {"cpu_s": spent - before.children_user - before.children_system}


def _command() -> list[str]:
    return [sys.executable, "-u", "-m", "jaxlora.cli"]


def measure(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Returns every run by what it was."""
    runs: dict[str, list[dict[str, float]]] = {"--help": [], "cold": [], "warm": []}
    for _ in range(rounds):
        runs["--help"].append(help_s())
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                runs[kind].append(train_s(QUICKSTART, Path(cache)))
    return runs


def table(result: dict[str, Any]) -> str:
    """Returns medians as a table."""
    runs = result["runs"]

    def median(kind: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[kind] if key in run)

    lines = [
        f"`jaxlora --help`: {median('--help', 'wall_s'):.2f} s.",
        "",
        f"| cache | {' | '.join(f'{name}, s' for name in MARKS)} | CPU seconds |",
        "| --- |" + " ---: |" * (len(MARKS) + 1),
    ]
    for kind in ("cold", "warm"):
        seconds = " | ".join(f"{median(kind, name):.1f}" for name in MARKS)
        lines.append(f"| {kind} | {seconds} | {median(kind, 'cpu_s'):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    machine.run("startup", parser, lambda options: {"runs": measure(options.rounds)}, table)


if __name__ == "__main__":
    main()
