"""SkyPilot: the task as a YAML reader sees it, and as SkyPilot's own parser does."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from jaxlora.config.load import load_config
from jaxlora.launch.skypilot import task

_VARIANTS = [
    ("v5e:4x4", {"spot": True}, ("tpu-v5litepod-16", 1)),
    ("v6e:1x1", {}, ("tpu-v6e-1", 1)),
    ("h100:8", {"nodes": 2, "spot": True, "zone": None}, ("H100", 2)),
    ("l4:1", {"zone": None, "variables": ("HF_TOKEN",)}, ("L4", 1)),
]
# SkyPilot pins other packages than ours: $SKYPILOT_PYTHON names the interpreter that has it.
_PYTHON = os.environ.get("SKYPILOT_PYTHON", sys.executable)
_PARSE = """
import json, os, sys, yaml
import sky
config = yaml.safe_load(open(sys.argv[1]))
given = [(name, os.environ[name]) for name in config.get("secrets", {})]  # --secret NAME
task = sky.Task.from_yaml_config(config, secrets_overrides=given)
(resources,) = task.resources
print(json.dumps({
    "name": task.name, "nodes": task.num_nodes, "run": task.run, "setup": task.setup,
    "accelerators": resources.accelerators, "spot": resources.use_spot,
    "recovery": resources.job_recovery, "zone": resources.zone,
    "secrets": sorted(task.secrets),
}))
"""


def parsed_by_sky(text: str, folder) -> dict:
    has = subprocess.run([_PYTHON, "-c", "import sky"], capture_output=True, check=False)
    if has.returncode:
        pytest.skip("skypilot is not installed ($SKYPILOT_PYTHON can name one that has it)")
    file = folder / "task.yml"
    file.write_text(text)
    env = {**os.environ, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "HF_TOKEN": "x"}
    env.pop("PYTHONPATH", None)
    result = subprocess.run(
        [_PYTHON, "-c", _PARSE, str(file)], capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("topology", "options", "expected"), _VARIANTS)
def test_skypilot_reads_what_was_asked_for(job, tmp_path, topology, options, expected):
    wanted = job(topology, **options)
    found = parsed_by_sky(task(wanted), tmp_path)
    assert (*found["accelerators"], found["nodes"]) == expected
    assert found["spot"] == wanted.spot
    assert found["recovery"]["max_restarts_on_errors"] == 3
    assert found["zone"] == wanted.zone
    assert found["secrets"] == sorted(wanted.variables)


def test_skypilot_hands_the_script_on_as_it_is(job, tmp_path):
    text = task(job(keys={"wandb_name": "$HOME ${PATH} $(touch canary) {{x}}"}))
    assert parsed_by_sky(text, tmp_path)["run"] == yaml.safe_load(text)["run"]


def test_machines_train_with_their_rank_and_the_first_address(machine, job):
    body = yaml.safe_load(task(job("h100:8", nodes=2)))
    assert machine.run(body["setup"]).returncode == 0
    result = machine.run(
        body["run"], SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="10.0.0.3\n10.0.0.4"
    )
    assert result.returncode == 0, result.stderr
    call = next(call for call in machine.calls if "jaxlora.cli" in call)
    assert call[1:] == [
        *("-m", "jaxlora.cli", "train", "run.yml"),
        *("--coordinator=10.0.0.3:8476", "--num-processes=2", "--process-id=1"),
    ]


def test_a_configuration_arrives_unharmed_and_nothing_in_it_runs(machine, job, hostile, tmp_path):
    body = yaml.safe_load(task(job("h100:8", {"wandb_name": hostile})))
    for script in (body["setup"], body["run"]):
        result = machine.run(script)
        assert result.returncode == 0, result.stderr
    seen = machine.root / "remote/jaxlora/run.yml"
    assert load_config(str(seen)).wandb_name == hostile
    assert not machine.canaries


def test_no_value_of_a_variable_is_written(job, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    text = task(job("l4:1", zone=None, variables=("HF_TOKEN",)))
    assert "canary-token" not in text
    assert yaml.safe_load(text)["secrets"] == {"HF_TOKEN": None}
