"""`jaxlora launch`: prints, writes, or hands to the client of the target."""

import os
import stat
import subprocess

import pytest

from jaxlora.cli import main

KEYS = """base_model: meta-llama/Llama-3.1-8B
datasets: [{path: gs://bucket/rows.jsonl, type: alpaca}]
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
learning_rate: 2e-4
output_dir: gs://bucket/run
"""
OPTIONS = ["--topology=v5e:4x4", "--zone=us-west4-a", "--install=jaxlora[tpu]"]


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yml").write_text(KEYS)
    return "my.yml"


@pytest.mark.parametrize("target", ["tpu-vm", "queued-resource", "gke", "skypilot"])
def test_a_dry_run_prints_and_writes_nothing(config, capsys, target):
    before = os.listdir()
    options = [each for each in OPTIONS if target != "gke" or "zone" not in each]
    assert main(["launch", config, "--on", target, *options, "--lora_r=8", "--dry-run"]) == 0
    assert "lora_r: 8" in capsys.readouterr().out
    assert os.listdir() == before


def test_a_script_that_is_written_can_be_run(config, tmp_path, capsys):
    arguments = ["launch", config, "--on", "tpu-vm", *OPTIONS]
    assert main([*arguments, "--output", "go.sh"]) == 0
    assert os.stat("go.sh").st_mode & stat.S_IXUSR
    assert "run it: bash go.sh" in capsys.readouterr().out
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == (tmp_path / "go.sh").read_text()


@pytest.mark.parametrize(
    ("target", "topology", "client", "words"),
    [
        ("slurm", "h100:8", "sbatch", ["my"]),
        ("gke", "v5e:4x4", "kubectl", ["apply", "-f", "my"]),
        ("skypilot", "l4:1", "sky", ["jobs", "launch", "--secret", "HF_TOKEN", "my"]),
    ],
)
def test_without_a_dry_run_the_client_gets_the_file(
    config, tmp_path, monkeypatch, target, topology, client, words
):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / client
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > called\ncp "${@: -1}" taken\nexit 5\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent) + os.pathsep + os.defpath)
    arguments = ["launch", config, "--on", target, "--topology", topology]
    arguments += [] if target == "slurm" else ["--install=x"]
    arguments += ["--env=HF_TOKEN"] if client == "sky" else []
    assert main(arguments) == 5, "the status of the client"
    called = (tmp_path / "called").read_text().split("\n")[:-1]
    assert [*called[:-1], os.path.basename(called[-1])] == words
    assert "meta-llama/Llama-3.1-8B" in (tmp_path / "taken").read_text()


def test_a_client_that_is_missing_is_named(config, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", config, "--on", "tpu-vm", *OPTIONS]) == 2
    assert "--on tpu-vm: gcloud is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "tpu-vm"], "--topology: missing; --on tpu-vm needs it"),
        (["--on", "tpu-vm", *OPTIONS, "--lora_rr=8"], 'Did you mean "lora_r"'),
        (["--on", "tpu-vm", *OPTIONS, "--dry-run", "--output=x"], "give one of them"),
        (["--on", "tpu-vm", *OPTIONS, "--output=no/x"], "--output: no/x cannot be written"),
        (["--on", "local", "--processes=0"], "--processes: 0; expected 1 or more"),
        (["--on", "slurm", "--topology=v5e:2x2"], "v5e is a TPU"),
        (["--on", "slurm", "--topology=h100:8", "--install=x"], "--install: no effect with --on"),
        (["--on", "tpu-vm", *OPTIONS, "--time-limit=1:00:00"], "only with slurm; remove it"),
        (["--on", "gke", *OPTIONS], "--zone: no effect with --on gke"),
        (["--on", "local", "--spot"], "--spot: no effect with --on local"),
    ],
)
def test_a_mistake_is_one_line(config, capsys, arguments, said):
    assert main(["launch", config, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_commands_of_a_local_run_can_be_pasted(config, capsys):
    assert (
        main(["launch", config, "--on", "local", "--processes=2", "--lora_r=8", "--dry-run"]) == 0
    )
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert text.count("--lora_r=8") == text.count("--num-processes=2") == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_local_script_ends_with_the_status_of_a_process_that_fails(
    config, tmp_path, monkeypatch, failing
):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\ncase "$*" in *process-id={failing}*) exit 7 ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    arguments = ["launch", config, "--on", "local", "--processes=2", "--output=go.sh"]
    assert main(arguments) == 0
    assert subprocess.run(["./go.sh"], check=False).returncode == 7
