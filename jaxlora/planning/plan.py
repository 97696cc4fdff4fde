"""`plan`: from a configuration to an estimate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from jaxlora.config.load import dump_config
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.planning.account import account
from jaxlora.planning.estimate import Estimate
from jaxlora.planning.topology import Topology, devices_of, environment, has_compiler


def plan(config: Config, topology: Topology, *, hlo: Path | None = None) -> Estimate:
    """Returns what a run takes on a topology, by compiling its train step.

    Args:
      config: the run; of its base model only config.json is read, of its data nothing.
      topology: devices, which need not be here.
      hlo: a file to write the compiled program's text to.

    Raises:
      UserError: what `train` would refuse in model, adapter or mesh; libtpu is missing; `hlo`
        cannot be written.
    """
    if hlo is not None:
        _check_writable(hlo)
    if not topology.local:
        if topology.hardware.platform == "tpu" and not has_compiler(topology):
            raise UserError(
                f"--topology: {topology.text} is compiled by libtpu, which is not installed; "
                'pip install "jaxlora[plan]".'
            )
        return _in_a_process(config, topology, hlo)
    made, text = account(config, devices_of(topology), topology)
    if hlo is not None:
        write_program(hlo, text)
    return made


def _check_writable(path: Path) -> None:
    """Refuses, before minutes of compiling, a file that could not be written after them."""
    if not path.parent.is_dir():
        raise UserError(f"--hlo: {path} cannot be written: there is no folder {path.parent}.")
    if path.is_dir():
        raise UserError(f"--hlo: {path} is a folder; name a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--hlo: {path} cannot be written: no permission.")


def write_program(path: Path, text: str) -> None:
    """Writes a compiled program's text.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"--hlo: {path} cannot be written: {error.strerror}.") from error


def _in_a_process(config: Config, topology: Topology, hlo: Path | None) -> Estimate:
    request = {
        "topology": topology.text,
        "config": yaml.safe_load(dump_config(config)),
        "hlo": None if hlo is None else str(hlo),
    }
    process = subprocess.run(
        [sys.executable, "-m", "jaxlora.planning.worker"],
        env=environment(topology, os.environ),
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise UserError(f"plan: compiling for {topology.text} failed: {lines[-1]}")
    answer = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise UserError(answer["error"])
    return Estimate.from_dict(answer)
