"""GKE: the manifests hold to the public fields, and the script in them runs."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from job_set_schema import CONFIG_MAP, JOB_SET

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.launch.gke import manifest

_VARIANTS = [
    ("v5e:4x4", {}),
    ("v6e:1x1", {"spot": True}),
    ("v5p:2x2x2", {"variables": ("HF_TOKEN", "WANDB_API_KEY")}),
    ("h100:8", {"nodes": 2, "spot": True, "image": "registry/x:1"}),
    ("v5e:4x4", {"slices": 3}),
]


def documents(job) -> tuple[dict, dict]:
    config_map, job_set = yaml.safe_load_all(manifest(job))
    jsonschema.validate(config_map, CONFIG_MAP)
    jsonschema.validate(job_set, JOB_SET)
    return config_map, job_set


def pod_of(job_set) -> dict:
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(("topology", "options"), _VARIANTS)
def test_manifests_hold_to_the_public_fields(job, topology, options):
    documents(job(topology, **options))


def test_the_schema_refuses_a_field_that_is_misspelled(job):
    _, job_set = documents(job())
    pod_of(job_set)["nodeSelectors"] = {}
    with pytest.raises(jsonschema.ValidationError, match="nodeSelectors"):
        jsonschema.validate(job_set, JOB_SET)


@pytest.mark.parametrize(("topology", "options"), _VARIANTS)
def test_there_is_a_pod_for_each_machine_and_it_asks_for_all_chips(job, topology, options):
    wanted = job(topology, **options)
    _, job_set = documents(wanted)
    (replicated,) = job_set["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == wanted.topology.hosts * wanted.nodes
    assert replicated["replicas"] == wanted.slices
    resource = "google.com/tpu" if wanted.topology.is_tpu else "nvidia.com/gpu"
    (container,) = pod_of(job_set)["containers"]
    assert container["resources"]["limits"] == {resource: wanted.topology.chips_per_host}
    assert [entry["name"] for entry in container.get("env", [])] == list(wanted.variables)


def test_spot_nodes_are_asked_for_and_endured(job):
    for spot in (False, True):
        _, job_set = documents(job(spot=spot))
        pod = pod_of(job_set)
        assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) is spot
        assert ("tolerations" in pod) is spot
        assert job_set["spec"]["failurePolicy"]["maxRestarts"] == (100 if spot else 3)


def test_names_of_peers_are_those_jobset_gives_and_fit_in_a_label(job):
    """<set>-<replicated job>-<job index>-<pod index>.<set>: 63 characters for a label."""
    wanted = job()
    config_map, job_set = documents(wanted)
    (replicated,) = job_set["spec"]["replicatedJobs"]
    host = f"{job_set['metadata']['name']}-{replicated['name']}-0-0"
    assert f"coordinator={host}.one:8476" in config_map["data"]["run.sh"]
    assert len(f"{'a' * 40}-{replicated['name']}-0-255") <= 63


def test_the_script_trains_with_the_number_of_its_pod(machine, job):
    config_map, _ = documents(job("h100:8", nodes=2))
    (machine.root / "run.yml").write_text(config_map["data"]["run.yml"])
    script = config_map["data"]["run.sh"].replace("/jaxlora-files", "..")
    result = machine.run(script, JOB_COMPLETION_INDEX="1")
    assert result.returncode == 0, result.stderr
    call = next(call for call in machine.calls if "jaxlora.cli" in call)
    assert call[-3:] == [
        *("--coordinator=one-worker-0-0.one:8476", "--num-processes=2", "--process-id=1"),
    ]
    assert (
        "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in Path(machine.env["SEEN"] + ".env").read_text()
    )


def test_a_machine_of_a_slice_has_its_number_among_all(machine, job):
    """In the order in which JAX numbers them: slice by slice."""
    config_map, _ = documents(job(slices=3))
    (machine.root / "run.yml").write_text(config_map["data"]["run.yml"])
    script = config_map["data"]["run.sh"].replace("/jaxlora-files", "..")
    result = machine.run(script, JOB_COMPLETION_INDEX="1", MEGASCALE_SLICE_ID="2")
    assert result.returncode == 0, result.stderr
    call = next(call for call in machine.calls if "jaxlora.cli" in call)
    assert call[-3:] == [
        *("--coordinator=one-worker-0-0.one:8476", "--num-processes=12", "--process-id=9"),
    ]
    assert machine.run(script, JOB_COMPLETION_INDEX="1").returncode != 0, "which slice is not known"


def test_slices_of_one_machine_are_not_joined_by_gke(job):
    with pytest.raises(UserError, match="--slices: 2 of one machine each"):
        manifest(job("v5e:2x4", slices=2))


def test_a_configuration_stands_in_the_manifest_byte_for_byte(job, hostile, tmp_path):
    wanted = job(keys={"wandb_name": hostile, "output_dir": f"gs://b/{hostile}"})
    config_map, _ = documents(wanted)
    assert config_map["data"]["run.yml"] == wanted.text
    (tmp_path / "seen.yml").write_text(config_map["data"]["run.yml"])
    assert load_config(str(tmp_path / "seen.yml")).wandb_name == hostile


def test_no_value_of_a_variable_is_written(job, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    assert "canary-token" not in manifest(job(variables=("HF_TOKEN",)))
