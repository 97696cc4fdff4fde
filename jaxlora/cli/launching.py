"""`jaxlora launch`: one run on other machines, or in several processes on this one."""

import argparse
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxlora.cli.command import add_command
from jaxlora.core.errors import UserError

if TYPE_CHECKING:
    from jaxlora.launch.job import Job

TARGETS = ("local", "tpu-vm", "queued-resource", "gke", "slurm", "skypilot")

_ELSEWHERE = TARGETS[1:]
_INSTALLED = tuple(target for target in _ELSEWHERE if target != "slurm")
# Options that some targets have no use for, and the targets that have one.
_TARGETS_OF: Mapping[str, tuple[str, ...]] = {
    "processes": ("local",),
    "topology": _ELSEWHERE,
    "nodes": ("gke", "slurm", "skypilot"),
    "slices": ("queued-resource", "gke"),
    "name": _ELSEWHERE,
    "spot": _ELSEWHERE,
    "install": _INSTALLED,
    "env": _ELSEWHERE,
    "zone": ("tpu-vm", "queued-resource", "skypilot"),
    "project": ("tpu-vm", "queued-resource"),
    "image": ("gke",),
    **dict.fromkeys(("partition", "account", "time_limit", "python"), ("slurm",)),
}

_EPILOG = """examples:
  jaxlora launch my.yml --on local --processes 4
  jaxlora launch my.yml --on tpu-vm --topology v5e:4x4 --zone us-west4-a --dry-run
  jaxlora launch my.yml --on queued-resource --topology v5e:4x4 --zone us-west4-a --spot
  jaxlora launch my.yml --on gke --topology v6e:4x4 --spot --output job.yml
  jaxlora launch my.yml --on slurm --topology h100:8 --nodes 2 --time-limit 12:00:00
  jaxlora launch my.yml --on skypilot --topology h100:8 --nodes 2 --spot

Any key of docs/configuration.md can follow as --key=value. docs/launch.md explains each target.
"""

# A wait for all at once would be 0 whatever they end with.
_LOCAL_SCRIPT = """#!/usr/bin/env bash
ids=()
{lines}status=0
for id in "${{ids[@]}}"; do
  wait "$id" || status=$?
done
exit "$status"
"""


def add_commands(commands: Any) -> None:
    """Adds the command of this module."""
    text = "Train on other machines, or in several processes on this one."
    launch = add_command(commands, "launch", _launch, text, config="launch")
    launch.epilog = _EPILOG
    add = launch.add_argument
    add("--on", required=True, choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    add("--dry-run", "--dry_run", action="store_true", help="print what would be run")
    add("--output", metavar="FILE", help="write what would be run, and run nothing")
    add("--processes", type=int, default=1, metavar="N", help="of --on local (default 1)")
    add("--topology", help="chips: v5e:4x4, v5p:2x2x2, h100:8 (a machine's GPUs), ...")
    add("--nodes", type=int, default=1, metavar="N", help="machines with GPUs (default 1)")
    add("--slices", type=int, default=1, metavar="N", help="TPU slices (default 1)")
    add("--name", help="of the job (default: from the configuration's name)")
    add("--spot", action="store_true", help="cheaper machines that may be taken away")
    add("--install", metavar="REQUIREMENT", help="what pip installs on the machines")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="variable to pass on, such as HF_TOKEN; its value is never written down",
    )
    add("--zone", help="of Google Cloud or SkyPilot, such as us-west4-a")
    add("--project", help="of Google Cloud")
    add("--image", help="container of GKE")
    add("--partition", help="of SLURM")
    add("--account", help="of SLURM")
    add("--time-limit", metavar="H:MM:SS", help="of SLURM")
    add("--python", metavar="PATH", help="interpreter on the SLURM cluster (default: this one)")


def _launch(options: argparse.Namespace) -> int:
    if options.dry_run and options.output:
        raise UserError("--dry-run prints and --output writes; give one of them.")
    for name, targets in _TARGETS_OF.items():
        value = getattr(options, name)
        given = value is True or value not in (None, False, 0, 1, [])
        if given and options.on not in targets:
            raise UserError(
                f"--{name.replace('_', '-')}: no effect with --on {options.on}, only with "
                f"{', '.join(targets)}; remove it."
            )
    if options.on == "local":
        return _local(options)
    job = _job(options)
    text = _generators()[options.on](job)
    if options.dry_run:
        print(text, end="")
        return 0
    if options.output:
        _write(options.output, text)
        print(f"written: {options.output}")
        print(f"run it: {shlex.join(_command(job, options.on, options.output))}")
        return 0
    return _run(job, options.on, text)


def _local(options: argparse.Namespace) -> int:
    from jaxlora.config.load import load_config
    from jaxlora.launch.processes import run_together, train_commands

    load_config(options.config, options.overrides)  # a mistake is said once, not by each process
    commands = train_commands(options.config, options.overrides, options.processes)
    lines = [f"{shlex.join(command)} &" for command in commands]
    if options.dry_run:
        print(*lines, "wait", sep="\n")
        return 0
    if options.output:
        _write(
            options.output,
            _LOCAL_SCRIPT.format(lines="".join(f"{each} ids+=($!)\n" for each in lines)),
        )
        print(f"written: {options.output}")
        return 0
    return run_together(commands)


def _generators() -> Mapping[str, Callable[["Job"], str]]:
    from jaxlora.launch import gke, skypilot, slurm, tpu

    return {
        "tpu-vm": tpu.vm_script,
        "queued-resource": tpu.queued_script,
        "gke": gke.manifest,
        "slurm": slurm.batch_script,
        "skypilot": skypilot.task,
    }


def _job(options: argparse.Namespace) -> "Job":
    from jaxlora.launch.job import Job, default_name, run_config
    from jaxlora.launch.topology import parse

    if options.topology is None:
        raise UserError(
            f"--topology: missing; --on {options.on} needs it, such as v5e:4x4 or h100:8."
        )
    given = {"image": options.image, "python": options.python}
    return Job(
        run_config(options.config, options.overrides),
        options.name or default_name(options.config),
        parse(options.topology),
        nodes=options.nodes,
        slices=options.slices,
        spot=options.spot,
        install=options.install,
        variables=tuple(options.env),
        zone=options.zone,
        project=options.project,
        partition=options.partition,
        account=options.account,
        time_limit=options.time_limit,
        **{"python": sys.executable} | {name: value for name, value in given.items() if value},
    )


def _command(job: "Job", target: str, file: str) -> list[str]:
    """The client's command that starts a generated file."""
    if target == "gke":
        return ["kubectl", "apply", "-f", file]
    if target == "slurm":
        return ["sbatch", file]
    if target == "skypilot":
        secrets = [word for name in job.variables for word in ("--secret", name)]
        return ["sky", "jobs", "launch", *secrets, file]
    return ["bash", file]


def _run(job: "Job", target: str, text: str) -> int:
    """Hands what was generated to the client of the target; returns its status."""
    with tempfile.TemporaryDirectory(prefix="jaxlora-launch-") as folder:
        file = os.path.join(folder, job.name)
        _write(file, text)
        command = _command(job, target, file)
        client = "gcloud" if command[0] == "bash" else command[0]
        if shutil.which(client) is None:
            raise UserError(
                f"--on {target}: {client} is not installed here; install it, or write the file "
                "with --output and run it where it is."
            )
        return subprocess.run(command, check=False).returncode


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        if text.startswith("#!"):
            os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}.") from error
