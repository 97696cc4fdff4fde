"""A JobSet for Google Kubernetes Engine (jobset.sigs.k8s.io), with its configuration beside it."""

from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.launch.documents import dump
from jaxlora.launch.job import Job, check_reachable
from jaxlora.launch.shell import PORT, install_lines, train_line

_FILES = "/jaxlora-files"
_SECRET = "jaxlora"
# A machine that was taken away costs a restart; so does one that fails by itself.
_RESTARTS = 100
_GRACE_S = 120  # for the checkpoint after SIGTERM; a spot machine gives 25 s at most


def manifest(job: Job) -> str:
    """Returns the YAML of a ConfigMap and a JobSet.

    The name and value of a secret are not in it: variables come from the secret `jaxlora`.

    Raises:
      UserError: a file that the machines cannot reach, results that would be lost with them,
        slices that GKE does not join.
    """
    check_reachable(job, "gke")
    if job.slices > 1 and job.topology.hosts == 1:
        raise UserError(
            f"--slices: {job.slices} of one machine each; GKE joins slices of several machines "
            "only. Give a larger --topology, or --on queued-resource."
        )
    files = {"run.yml": job.text, "run.sh": _worker(job)}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": files,
    }
    return dump(config, _job_set(job))


def _worker(job: Job) -> str:
    # Pod n of a job has the number n, on TPUs too: there GKE numbers the slice's machines so. Of
    # several slices each is a job of its own, and GKE says in its pods which.
    number = "$JOB_COMPLETION_INDEX"
    if job.slices > 1:
        number = f"$((MEGASCALE_SLICE_ID * {job.topology.hosts} + JOB_COMPLETION_INDEX))"
    peers = f"process_id={number}\ncoordinator={job.name}-worker-0-0.{job.name}:{PORT}\n"
    driver = ""
    if not job.topology.is_tpu:  # where GKE puts it
        driver = "export LD_LIBRARY_PATH=/usr/local/nvidia/lib64:${LD_LIBRARY_PATH:-}\n"
    return (
        'set -euo pipefail\nexport HOME=${HOME:-/root}\ncd "$HOME"\n'
        + driver
        + install_lines(job)
        + (peers if job.hosts > 1 else "")
        + train_line(job, f"{_FILES}/run.yml")
    )


def _job_set(job: Job) -> dict[str, Any]:
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        "nodeSelector": {**job.topology.gke_labels}
        | ({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
        "containers": [_container(job)],
        "volumes": [{"name": "files", "configMap": {"name": job.name}}],
    }
    if job.spot:
        key = "cloud.google.com/gke-spot"
        spot = {"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        pod["tolerations"] = [spot]
    machines = job.hosts // job.slices
    indexed = {
        "parallelism": machines,
        "completions": machines,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one machine lost is the whole set lost: the set starts again
        "template": {"spec": pod},
    }
    # All machines of a slice are one node pool, and no other job's pods may come between.
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    metadata: dict[str, Any] = {"name": job.name}
    if job.topology.is_tpu:
        metadata["annotations"] = {exclusive: "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": _RESTARTS if job.spot else 3},
            "replicatedJobs": [
                {"name": "worker", "replicas": job.slices, "template": {"spec": indexed}}
            ],
        },
    }


def _container(job: Job) -> dict[str, Any]:
    resource = "google.com/tpu" if job.topology.is_tpu else "nvidia.com/gpu"
    amount = {resource: job.topology.chips_per_host}
    container: dict[str, Any] = {
        "name": "train",
        "image": job.image,
        "command": ["bash", f"{_FILES}/run.sh"],
        "ports": [{"containerPort": PORT}],
        "resources": {"requests": amount, "limits": dict(amount)},
        "volumeMounts": [{"name": "files", "mountPath": _FILES, "readOnly": True}],
    }
    if job.variables:
        container["env"] = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": _SECRET, "key": name}}}
            for name in job.variables
        ]
    return container
