"""A slice of the trials of `make reliability`: kills, damage, full disk, folders in use, NaN."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_slice_of_the_trials_holds():
    environment = {name: value for name, value in os.environ.items() if "JAX_COMPIL" not in name}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "reliability"), "--slice"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    held = {
        law: int(trials) for law, trials in re.findall(r"held: (.*?): \d+ of (\d+)", done.stdout)
    }
    assert len(held) >= 6
    assert sum(held.values()) >= 50
