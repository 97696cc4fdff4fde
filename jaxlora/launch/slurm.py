"""A batch script for SLURM: one process a machine, on a file system that all of them share."""

from jaxlora.core.errors import UserError
from jaxlora.launch.job import Job
from jaxlora.launch.shell import here_document, quote

_WARNING_S = 120  # between SIGTERM and the end of the time limit: for the checkpoint
_SAVED = 143  # how a run ends that SIGTERM has stopped and saved


def batch_script(job: Job) -> str:
    """Returns a script for sbatch.

    Raises:
      UserError: TPUs, which SLURM does not have.
    """
    if job.topology.is_tpu:
        raise UserError(
            f"--topology: {job.topology.kind} is a TPU; --on slurm needs GPUs, such as h100:8."
        )
    return f"""#!/bin/bash
{_directives(job)}# Trains {job.name} on {job.nodes} x {job.topology.chips} GPUs.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
config={job.name}-$SLURM_JOB_ID.yml
{here_document('"$config"', job.text)}{_rendezvous(job)}status=0
srun --kill-on-bad-exit=1 bash -c {quote(_task(job))} train "$config" "${{coordinator:-}}" \\
  || status=$?
{_ending(job)}exit $status
"""


def _directives(job: Job) -> str:
    given = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.topology.chips,
        "partition": job.partition,
        "account": job.account,
        "time": job.time_limit,
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{_WARNING_S}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in given.items() if value is not None]
    lines.append("#SBATCH --exclusive")
    if job.spot:
        lines.append("#SBATCH --requeue")
    return "\n".join(lines) + "\n"


def _rendezvous(job: Job) -> str:
    """Bash before srun: where process 0 listens, and that each process has all GPUs.

    JAX, when it sees SLURM, gives a process one GPU, whatever else it is told, unless
    JAX_LOCAL_DEVICE_IDS says otherwise.
    """
    devices = ",".join(map(str, range(job.topology.chips)))
    lines = f"export JAX_LOCAL_DEVICE_IDS={devices}\n"
    if job.hosts > 1:
        # Several jobs may share a machine's network: the port follows from the job.
        lines += (
            'names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")\n'
            "coordinator=${names%%$'\\n'*}:$((61440 + SLURM_JOB_ID % 4096))\n"
        )
    return lines


def _task(job: Job) -> str:
    """What each machine runs; $1 is the configuration, $2 the coordinator."""
    task = f'exec {quote(job.python)} -m jaxlora.cli train "$1"'
    if job.hosts > 1:
        task += f' --coordinator="$2" --num-processes={job.hosts} --process-id="$SLURM_PROCID"'
    return task


def _ending(job: Job) -> str:
    """Bash after srun: a run that was stopped and saved goes back into the queue."""
    if not job.spot:
        return ""
    return f"""if [ "$status" -eq {_SAVED} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
"""
