"""SLURM: directives are read as sbatch reads them, the script runs with an srun of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.launch.slurm import batch_script

_ID = {"SLURM_JOB_ID": "4097", "SLURM_JOB_NODELIST": "node-[a-b]"}
# Options of sbatch (slurm.schedmd.com/sbatch.html) that we may write.
_KNOWN = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "partition", "account", "time"),
    *("output", "open-mode", "signal", "exclusive", "requeue"),
}


def directives(script: str) -> dict[str, str | None]:
    """Options of a batch script: sbatch reads lines that begin with #SBATCH up to the first
    command."""
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    found: dict[str, str | None] = {}
    for line in lines[1:]:
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert name in _KNOWN
            assert name not in found
            found[name] = value or None
    assert script.count("\n#SBATCH") == len(found), "a directive after the first command is lost"
    return found


def run(machine, script, **variables):
    submitted = machine.root / "remote"
    text = script.replace(sys.executable, "train")
    return machine.run(text, **_ID, SLURM_SUBMIT_DIR=str(submitted), **variables)


def test_directives_say_what_was_asked_for(job):
    wanted = job(
        *("h100:8",), nodes=2, partition="gpu", account="lab", time_limit="12:00:00", spot=True
    )
    found = directives(batch_script(wanted))
    expected = {"job-name": "one", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8"}
    expected |= {"partition": "gpu", "account": "lab", "time": "12:00:00"}
    assert found.items() >= expected.items()
    assert "requeue" in found
    assert found["signal"] == "TERM@120"


def test_what_was_not_asked_for_is_left_to_the_cluster(job):
    found = directives(batch_script(job("h100:8")))
    assert not {"partition", "account", "time", "requeue"} & found.keys()


def test_each_task_trains_with_its_number_and_the_first_machine(machine, job):
    wanted = job("h100:8", nodes=2, python=sys.executable)
    result = run(machine, batch_script(wanted))
    assert result.returncode == 0, result.stderr
    call = next(call for call in machine.calls if call[0] == "train")
    assert call[1:] == [
        *("-m", "jaxlora.cli", "train", "one-4097.yml"),
        *("--coordinator=node-a:61441", "--num-processes=2", "--process-id=1"),
    ]
    assert Path(machine.env["SEEN"]).read_text() == wanted.text


def test_a_process_is_told_of_all_gpus_of_its_machine(machine, job):
    """JAX under SLURM takes the one GPU numbered SLURM_LOCALID, whatever else it is told."""
    run(machine, batch_script(job("h100:4", nodes=2, python=sys.executable)))
    seen = Path(machine.env["SEEN"] + ".env").read_text().splitlines()
    (given,) = [line.partition("=")[2] for line in seen if line.startswith("JAX_LOCAL_DEVICE_IDS")]
    program = (
        "import jax; from jax._src.clusters import ClusterEnv\n"
        "print(ClusterEnv.auto_detect_unset_distributed_params('a:1', 2, 0, None, None, 1)[3])\n"
    )
    slurm = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **{"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node-a", "SLURM_LOCALID": "0"},
        **{"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "JAX_PLATFORMS": "cpu"},
    }
    alone = subprocess.run(
        [sys.executable, "-c", program], env=slurm, capture_output=True, text=True, check=True
    )
    assert alone.stdout.split() == ["[0]"], "JAX no longer does: the variable is not needed"
    assert given == "0,1,2,3"


@pytest.mark.parametrize(
    ("status", "spot", "back"), [("143", True, 1), ("143", False, 0), ("2", True, 0)]
)
def test_a_run_that_was_stopped_and_saved_goes_back_into_the_queue(
    machine, job, status, spot, back
):
    script = batch_script(job("h100:8", spot=spot, python=sys.executable))
    result = run(machine, script, TRAIN_STATUS=status)
    assert result.returncode == int(status)
    assert len([call for call in machine.calls if call[:2] == ["scontrol", "requeue"]]) == back


def test_a_configuration_arrives_unharmed_and_nothing_in_it_runs(machine, job, hostile):
    wanted = job("h100:8", {"wandb_name": hostile}, nodes=2, python=sys.executable)
    script = batch_script(wanted)
    assert directives(script)["job-name"] == "one"
    result = run(machine, script)
    assert result.returncode == 0, result.stderr
    assert load_config(str(machine.root / "remote/one-4097.yml")).wandb_name == hostile
    assert not machine.canaries


def test_an_interpreter_with_odd_characters_is_one_word(machine, job, hostile):
    run(machine, batch_script(job("h100:8", python=hostile)))
    assert not machine.canaries


def test_tpus_are_refused(job):
    with pytest.raises(UserError, match="v5e is a TPU; --on slurm needs GPUs"):
        batch_script(job("v5e:4x4"))
