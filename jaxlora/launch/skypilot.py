"""A task for SkyPilot, run as a managed job that comes back after its machines were taken."""

from typing import Any

from jaxlora.launch.documents import dump
from jaxlora.launch.job import Job, check_reachable
from jaxlora.launch.shell import PORT, here_document, install_lines, train_line


def task(job: Job) -> str:
    """Returns the YAML of a task.

    Raises:
      UserError: a file that the machines cannot reach, results that would be lost with them.
    """
    check_reachable(job, "skypilot")
    resources: dict[str, Any] = {"accelerators": job.topology.sky_name}
    if job.topology.is_tpu:
        resources["accelerator_args"] = {"runtime_version": job.topology.runtime}
    if job.zone:
        resources["infra"] = f"gcp/*/{job.zone}" if job.topology.is_tpu else f"*/*/{job.zone}"
    resources["use_spot"] = job.spot
    resources["job_recovery"] = {"max_restarts_on_errors": 3}
    body: dict[str, Any] = {"name": job.name, "resources": resources}
    if job.nodes > 1:
        body["num_nodes"] = job.nodes
    if job.variables:
        body["secrets"] = dict.fromkeys(job.variables)
    folder = "mkdir -p ~/jaxlora\ncd ~/jaxlora\n"
    body["setup"] = "set -euo pipefail\n" + folder + install_lines(job)
    body["run"] = (
        "set -euo pipefail\n"
        + folder
        + here_document("run.yml", job.text)
        + (_PEERS if job.hosts > 1 else "")
        + train_line(job, "run.yml")
    )
    return dump(body)


# The machines' addresses, one a line, first the one with rank 0.
_PEERS = f"""process_id=$SKYPILOT_NODE_RANK
coordinator=${{SKYPILOT_NODE_IPS%%$'\\n'*}}:{PORT}
"""
