"""Cloud TPU through gcloud: a TPU VM that is created and used, or a queued resource."""

from jaxlora.core.errors import UserError
from jaxlora.launch.job import Job, check_reachable
from jaxlora.launch.shell import (
    HEADER,
    PORT,
    here_document,
    install_lines,
    quote,
    train_line,
)

# Every machine of a slice knows its number and its peers from the metadata server, from which
# JAX takes them too. A peer is a host name, or a triple that ends in an address.
_PEERS = f"""metadata() {{
  curl -sf -H 'Metadata-Flavor: Google' \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
process_id=$(metadata agent-worker-number)
first=$(metadata worker-network-endpoints | cut -d, -f1)
coordinator=${{first##*:}}:{PORT}
"""
# Each slice has its own machine 0; which slice this is, and where process 0 is, are in `tpu-env`,
# lines such as MEGASCALE_SLICE_ID: '1'.
_SLICES = f"""megascale() {{
  metadata tpu-env | sed -n "s/^MEGASCALE_$1: *'\\{{0,1\\}}\\([^':]*\\).*/\\1/p"
}}
slice=$(megascale SLICE_ID)
process_id=$((${{slice:?is not in the metadata of this machine}} * HOSTS + process_id))
coordinator=$(megascale COORDINATOR_ADDRESS)
coordinator=${{coordinator:?is not in the metadata of this machine}}:{PORT}
"""


def vm_script(job: Job) -> str:
    """Returns bash that creates a TPU VM if need be, and trains on all its machines.

    Raises:
      UserError: an option is missing, or a file that the machines cannot reach.
    """
    flags = _flags(job, "tpu-vm")
    create = f"--accelerator-type={job.topology.accelerator_type} --version={job.topology.runtime}"
    create += " --spot" if job.spot else ""
    return (
        HEADER.format(what=f"Trains {job.name} on a Cloud TPU VM, {job.topology.accelerator_type}.")
        + "files=$(mktemp -d)\ntrap 'rm -rf \"$files\"' EXIT\n"
        + here_document('"$files/jaxlora-run.yml"', job.text)
        + here_document('"$files/jaxlora-worker.sh"', _worker(job))
        + _variables(job)
        + f"""tpu=(gcloud compute tpus tpu-vm)
where=({flags})
state=$("${{tpu[@]}}" describe {job.name} "${{where[@]}}" --format='value(state)' \\
  2> /dev/null || true)
case $state in
  PREEMPTED | TERMINATED)  # it cannot be started again
    "${{tpu[@]}}" delete {job.name} "${{where[@]}}" --quiet
    state= ;;
esac
if [ -z "$state" ]; then
  "${{tpu[@]}}" create {job.name} "${{where[@]}}" {create}
fi
"${{tpu[@]}}" scp "$files"/jaxlora-* {job.name}: "${{where[@]}}" --worker=all
"${{tpu[@]}}" ssh {job.name} "${{where[@]}}" --worker=all --command='bash jaxlora-worker.sh'
echo "done; it costs until: gcloud compute tpus tpu-vm delete {job.name} ${{where[*]}}"
"""
    )


def queued_script(job: Job) -> str:
    """Returns bash that asks for a TPU that trains by itself once it is there.

    The same script, run again, takes a run up that lost its machines.

    Raises:
      UserError: an option is missing, a file that the machines cannot reach, or a secret.
    """
    flags, node = _flags(job, "queued-resource"), job.name + ("-0" if job.slices > 1 else "")
    if job.variables:
        raise UserError(
            "--env: --on queued-resource would put values into metadata that others can read; use "
            "--on tpu-vm, or a public or copied base model."
        )
    several = f"--node-count={job.slices} --node-prefix={job.name}"
    create = (
        f"{several if job.slices > 1 else f'--node-id={job.name}'} "
        f"--accelerator-type={job.topology.accelerator_type} "
        f"--runtime-version={job.topology.runtime}" + (" --spot" if job.spot else "")
    )
    startup = (
        "#!/usr/bin/env bash\n"
        "# Runs as root whenever a machine starts.\n"
        "export HOME=${HOME:-/root}\n"
        'cd "$HOME"\n' + here_document("jaxlora-run.yml", job.text) + _worker(job)
    )
    return (
        HEADER.format(
            what=f"Asks for a queued {job.topology.accelerator_type} that trains {job.name}."
        )
        + "files=$(mktemp -d)\ntrap 'rm -rf \"$files\"' EXIT\n"
        + here_document('"$files/startup.sh"', startup)
        + f"""queue=(gcloud compute tpus queued-resources)
where=({flags})
if state=$("${{queue[@]}}" describe {job.name} "${{where[@]}}" --format='value(state.state)' \\
    2> /dev/null); then
  case $state in
    FAILED | SUSPENDED)  # the machines are gone; the checkpoints are in output_dir
      "${{queue[@]}}" delete {job.name} "${{where[@]}}" --force --quiet ;;
    *)
      echo "{job.name} is $state already"
      exit 0 ;;
  esac
fi
"${{queue[@]}}" create {job.name} "${{where[@]}}" {create} \\
  --metadata-from-file="startup-script=$files/startup.sh"
echo "look:   gcloud compute tpus queued-resources describe {job.name} ${{where[*]}}"
echo "log:    gcloud compute tpus tpu-vm ssh {node} ${{where[*]}} --worker=0" \\
  "--command='sudo journalctl -u google-startup-scripts -f'"
echo "delete: gcloud compute tpus queued-resources delete {job.name} ${{where[*]}} --force"
"""
    )


def _worker(job: Job) -> str:
    """What every machine runs, in its home folder."""
    take = "if [ -f jaxlora-env ]; then\n  . ./jaxlora-env\n  rm jaxlora-env\nfi\n"
    return (
        "set -euo pipefail\n"
        + (take if job.variables else "")
        + "mkdir -p jaxlora\ncd jaxlora\n"
        + install_lines(job)
        + (_PEERS if job.hosts > 1 else "")
        + (_SLICES.replace("HOSTS", str(job.topology.hosts)) if job.slices > 1 else "")
        + train_line(job, "../jaxlora-run.yml")
    )


def _variables(job: Job) -> str:
    """Bash that writes the variables to a file for the machines, readable by its owner alone."""
    if not job.variables:
        return ""
    lines = [
        f"  printf 'export {name}=%q\\n' \"${{{name}:?is not set here}}\"" for name in job.variables
    ]
    body = "\n".join(lines)
    return f'(\n  umask 077\n  : > "$files/jaxlora-env"\n)\n{{\n{body}\n}} > "$files/jaxlora-env"\n'


def _flags(job: Job, target: str) -> str:
    if not job.topology.is_tpu:
        raise UserError(f"--topology: {job.topology.kind} is no TPU; --on {target} needs one.")
    check_reachable(job, target)
    flags = f"--zone={quote(job.need('zone', target, 'us-west4-a'))}"
    return flags + (f" --project={quote(job.project)}" if job.project else "")
