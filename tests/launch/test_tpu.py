"""Cloud TPU: the scripts run in bash, with a gcloud that notes what it is told."""

from pathlib import Path

import pytest

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.launch.topology import parse
from jaxlora.launch.tpu import queued_script, vm_script

WHERE = "--zone=us-west4-a"


def trained(machine) -> list[str]:
    return next(call for call in machine.calls if "jaxlora.cli" in call)[1:]


def test_a_tpu_vm_is_created_given_the_files_and_trains_on_every_machine(machine, job):
    wanted = job(project="my-project", spot=True)
    result = machine.run(vm_script(wanted))
    assert result.returncode == 0, result.stderr
    created = machine.called("gcloud", "create")
    assert created[1:6] == ["compute", "tpus", "tpu-vm", "create", "one"]
    assert set(created[6:]) == {
        *(WHERE, "--project=my-project", "--accelerator-type=v5litepod-16"),
        *("--version=v2-alpha-tpuv5-lite", "--spot"),
    }
    for verb in ("scp", "ssh"):
        assert {"--worker=all", WHERE, "--project=my-project"} <= set(
            machine.called("gcloud", verb)
        )
    assert trained(machine) == [
        *("-m", "jaxlora.cli", "train", "../jaxlora-run.yml"),
        *("--coordinator=10.0.0.7:8476", "--num-processes=4", "--process-id=2"),
    ]
    assert Path(machine.env["SEEN"]).read_text() == wanted.text


def test_a_tpu_vm_that_is_there_is_used_again(machine, job):
    assert machine.run(vm_script(job()), STATE="READY").returncode == 0
    assert not [call for call in machine.calls if "create" in call]
    assert trained(machine)


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_a_tpu_vm_that_was_taken_away_is_made_anew(machine, job, state):
    assert machine.run(vm_script(job(spot=True)), STATE=state).returncode == 0
    verbs = [call[4] for call in machine.calls if call[0] == "gcloud"]
    assert verbs == ["describe", "delete", "create", "scp", "ssh"]
    assert trained(machine)


def test_peers_may_be_named_by_host_or_by_address(machine, job):
    assert machine.run(vm_script(job()), PEERS="host-0,host-1").returncode == 0
    assert "--coordinator=host-0:8476" in trained(machine)


def test_one_machine_has_no_peers_to_meet(machine, job):
    assert machine.run(vm_script(job("v5e:2x4"))).returncode == 0
    assert trained(machine) == ["-m", "jaxlora.cli", "train", "../jaxlora-run.yml"]


def test_the_status_of_the_training_is_that_of_the_script(machine, job):
    assert machine.run(vm_script(job()), TRAIN_STATUS="3").returncode == 3


def test_a_configuration_arrives_unharmed_and_nothing_in_it_runs(machine, job, hostile):
    wanted = job(keys={"output_dir": f"gs://bucket/{hostile}", "wandb_name": hostile})
    result = machine.run(vm_script(wanted))
    assert result.returncode == 0, result.stderr
    seen = load_config(_yml(machine.env["SEEN"]))
    assert seen.output_dir == f"gs://bucket/{hostile}"
    assert seen.wandb_name == hostile
    assert not machine.canaries


def test_a_requirement_arrives_unharmed_and_nothing_in_it_runs(machine, job, hostile):
    result = machine.run(vm_script(job(install=hostile)))
    assert result.returncode == 0, result.stderr
    assert hostile in machine.called("python3", "install", "venv/bin/python")
    assert not machine.canaries


def test_a_variable_reaches_the_training_and_is_not_left_behind(machine, job, hostile):
    result = machine.run(vm_script(job(variables=("HF_TOKEN",))), HF_TOKEN=hostile)
    assert result.returncode == 0, result.stderr
    assert f"HF_TOKEN={hostile}" in Path(machine.env["SEEN"] + ".env").read_text()
    assert not (machine.root / "remote/jaxlora-env").exists()
    assert not machine.canaries


def test_the_file_with_the_variables_is_readable_by_its_owner_alone(machine, job):
    machine.run(vm_script(job(variables=("HF_TOKEN",))), HF_TOKEN="t")
    assert set(Path(machine.env["SEEN"] + ".mode").read_text().split()) == {"600"}


def test_a_variable_that_is_not_set_is_said_before_anything_is_created(machine, job):
    result = machine.run(vm_script(job(variables=("HF_TOKEN",))))
    assert result.returncode != 0
    assert "HF_TOKEN: is not set here" in result.stderr
    assert not machine.calls


def test_a_queued_resource_starts_training_by_itself(machine, job):
    wanted = job(spot=True)
    result = machine.run(queued_script(wanted))
    assert result.returncode == 0, result.stderr
    created = machine.called("gcloud", "create")
    assert created[1:6] == ["compute", "tpus", "queued-resources", "create", "one"]
    assert {
        *(WHERE, "--node-id=one", "--accelerator-type=v5litepod-16", "--spot"),
        "--runtime-version=v2-alpha-tpuv5-lite",
    } <= set(created)
    startup = (machine.root / "remote/startup.sh").read_text()
    assert machine.run(startup).returncode == 0
    assert Path(machine.env["SEEN"]).read_text() == wanted.text
    assert "--process-id=2" in trained(machine)


SLICES = "ZONE: 'us-west4-a'\\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.3'\\n"
SLICES += "MEGASCALE_NUM_SLICES: '2'\\nMEGASCALE_SLICE_ID: '1'\\n"


@pytest.mark.parametrize(("topology", "number"), [("v5e:4x4", 1 * 4 + 2), ("v5e:2x4", 1)])
def test_queued_slices_number_their_machines_one_after_another(machine, job, topology, number):
    assert machine.run(queued_script(job(topology, slices=2))).returncode == 0
    created = machine.called("gcloud", "create")
    assert {"--node-count=2", "--node-prefix=one"} <= set(created)
    assert not [word for word in created if word.startswith("--node-id")]
    startup = (machine.root / "remote/startup.sh").read_text()
    index = "0" if topology == "v5e:2x4" else "2"
    result = machine.run(startup, TPU_ENV=SLICES, NUMBER=index)
    assert result.returncode == 0, result.stderr
    count = 2 * parse(topology).hosts
    assert trained(machine)[-3:] == [
        *("--coordinator=10.0.0.3:8476", f"--num-processes={count}", f"--process-id={number}"),
    ]


def test_a_machine_that_does_not_know_its_slice_says_so(machine, job):
    assert machine.run(queued_script(job(slices=2))).returncode == 0
    result = machine.run((machine.root / "remote/startup.sh").read_text())
    assert result.returncode != 0
    assert "slice: is not in the metadata" in result.stderr


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_queued_resource_that_lost_its_machines_is_asked_for_again(machine, job, state):
    assert machine.run(queued_script(job()), STATE=state).returncode == 0
    verbs = [call[4] for call in machine.calls if call[0] == "gcloud"]
    assert verbs == ["describe", "delete", "create"]


@pytest.mark.parametrize("state", ["ACTIVE", "WAITING_FOR_RESOURCES"])
def test_a_queued_resource_that_is_there_is_left_alone(machine, job, state):
    result = machine.run(queued_script(job()), STATE=state)
    assert result.returncode == 0
    assert f"one is {state} already" in result.stdout
    assert [call[4] for call in machine.calls if call[0] == "gcloud"] == ["describe"]


def test_a_queued_configuration_arrives_unharmed(machine, job, hostile):
    wanted = job(keys={"wandb_name": hostile})
    assert machine.run(queued_script(wanted)).returncode == 0
    assert machine.run((machine.root / "remote/startup.sh").read_text()).returncode == 0
    assert load_config(_yml(machine.env["SEEN"])).wandb_name == hostile
    assert not machine.canaries


def test_secrets_are_kept_out_of_metadata(job):
    with pytest.raises(UserError, match="--env: --on queued-resource would put values"):
        queued_script(job(variables=("HF_TOKEN",)))


def test_what_a_tpu_vm_needs_is_said(job):
    with pytest.raises(UserError, match="--zone: missing; --on tpu-vm needs it"):
        vm_script(job(zone=None))
    with pytest.raises(UserError, match="h100 is no TPU"):
        vm_script(job("h100:8"))


def _yml(seen: str) -> str:
    """The file under a name that says its format."""
    path = Path(seen).with_name("seen.yml")
    path.write_text(Path(seen).read_text())
    return str(path)
