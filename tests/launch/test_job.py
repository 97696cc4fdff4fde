"""What is asked of a job before anything is generated."""

import dataclasses
import json
import re

import pytest

from jaxlora.core.errors import UserError
from jaxlora.launch.job import check_reachable, default_name, requirement, run_config
from jaxlora.launch.topology import parse
from jaxlora.planning import topology as planning


@pytest.mark.parametrize(
    "name", ["", "My-Run", "a b", "a;b", "-a", "a-", "1a", "a" * 41, "a\n", "é"]
)
def test_a_name_is_a_dns_label(job, name):
    with pytest.raises(UserError, match="--name"):
        job_named(job, name)


def job_named(job, name):
    return dataclasses.replace(job(), name=name)


@pytest.mark.parametrize(
    "option", ["zone", "project", "image", "partition", "account", "time_limit"]
)
def test_no_option_can_carry_more_than_one_plain_word(job, option, hostile):
    value = f"{hostile}\n" if hostile == "END_OF_FILE" else hostile  # that is a plain word
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}"):
        job(**{option: value})


@pytest.mark.parametrize("name", ["A-B", "HF_TOKEN=x", "$(x)", "", "1A", "A\n"])
def test_a_variable_is_given_by_its_name_alone(job, name):
    with pytest.raises(UserError, match="--env"):
        job(variables=(name,))


def test_slices_are_of_tpus_and_hold_what_the_mesh_asks_of_them(job):
    assert job(slices=2).hosts == 8
    assert job(keys={"mesh": {"context": 4}}, slices=2).hosts == 8  # fsdp over both slices
    with pytest.raises(UserError, match="--slices: 2; expected 1 or more, of a TPU topology"):
        job("h100:8", slices=2)
    with pytest.raises(UserError, match=r"mesh: 2 slices do not fit .*make data a multiple of 2"):
        job(keys={"mesh": {"data": 1, "fsdp": 1, "context": 32}}, slices=2)
    with pytest.raises(UserError, match="32 are here"):
        job(keys={"mesh": {"data": 3, "fsdp": 4}}, slices=2)


def test_a_run_on_machines_that_may_go_resumes_by_itself(job):
    assert job().config.auto_resume_from_checkpoints
    chosen = job(keys={"resume_from_checkpoint": "gs://bucket/runs/zero"})
    assert not chosen.config.auto_resume_from_checkpoints


def test_a_file_of_this_machine_is_refused_by_its_key(job, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    wanted = job(keys={"datasets": [{"path": str(rows), "type": "alpaca"}]})
    with pytest.raises(UserError, match=re.escape(f"datasets.0.path: {rows} is on this machine")):
        check_reachable(wanted, "tpu-vm")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"chat_template_jinja": "FILE"}, "chat_template_jinja"),
        ({"resume_from_checkpoint": "FILE"}, "resume_from_checkpoint"),
        (
            {"datasets": [{"path": "json", "data_files": ["a", "FILE"], "type": "alpaca"}]},
            "datasets.0.data_files",
        ),
    ],
)
def test_no_key_that_can_name_a_file_is_forgotten(job, tmp_path, keys, named):
    file = tmp_path / "it"
    file.write_text("{}")
    wanted = job(keys=json.loads(json.dumps(keys).replace("FILE", str(file))))
    with pytest.raises(UserError, match=re.escape(f"{named}: {file} is on this machine")):
        check_reachable(wanted, "tpu-vm")


def test_results_are_not_left_on_machines_that_vanish(job):
    local = {"output_dir": "outputs/one"}
    check_reachable(job(keys=local), "tpu-vm")
    for wanted, target in ((job(keys=local, spot=True), "tpu-vm"), (job(keys=local), "gke")):
        with pytest.raises(UserError, match="output_dir: outputs/one would lie on a machine"):
            check_reachable(wanted, target)


def test_an_installation_from_a_folder_cannot_be_repeated_elsewhere(job):
    assert requirement(job()) == "jaxlora[tpu]==0.1.0"
    with pytest.raises(UserError, match="--install: missing"):
        requirement(job(install=None))


def test_a_mistake_in_the_configuration_is_said_here(tmp_path):
    file = tmp_path / "bad.yml"
    file.write_text("base_model: m\nlora_rr: 3\n")
    with pytest.raises(UserError, match=r"bad\.yml:2"):
        run_config(str(file), [])


def test_names_of_files_become_names_of_jobs():
    assert default_name("configs/Llama 3.1_8B (v2).yml") == "llama-3-1-8b-v2"
    assert default_name("???.yml") == "run"


@pytest.mark.parametrize(
    ("text", "hosts", "per_host", "accelerator"),
    [
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:2x4", 1, 8, "v5litepod-8"),
        ("v5e:4x4", 4, 4, "v5litepod-16"),
        ("v6e:16x16", 64, 4, "v6e-256"),
        ("v5p:2x2x1", 1, 4, "v5p-8"),
        ("v5p:4x4x8", 32, 4, "v5p-256"),
        ("v4:2x2x2", 2, 4, "v4-16"),
    ],
)
def test_slices_are_what_google_documents(text, hosts, per_host, accelerator):
    found = parse(text)
    assert (found.hosts, found.chips_per_host) == (hosts, per_host)
    assert found.accelerator_type == accelerator


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e", "is not understood"),
        ("v5e:3x3", "has no such slice; expected 1x1, 2x2"),
        ("v5p:4x4", "has no such slice"),
        ("h100:2x4", "give the GPUs of one machine, such as h100:8"),
        ("v5:2x2", "v5 is not known"),
        ("v5e:2x2;x", "is not understood"),
    ],
)
def test_a_topology_that_is_none_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse(text)


@pytest.mark.parametrize("text", ["v5e:4x4", "v5p:2x2x2", "v6e:2x4", "h100:8", "h200:8", "a100:8"])
def test_topologies_are_spelled_as_the_plan_spells_them(text):
    planned, launched = planning.parse(text), parse(text)
    assert planned.kind == launched.kind
    assert planned.size == launched.chips
