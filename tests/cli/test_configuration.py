"""init, config check, config schema, fetch configs, train --dry-run; strictness of all flags."""

import io
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from minimal_configs import LORA, MINIMAL
from tiny_runs import write_base, write_rows

from jaxlora.cli import main
from jaxlora.config.load import load_config

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(**keys)``: a file without model and data; the working directory is empty."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def write(**keys):
        path = tmp_path / "my.yml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


def status(arguments):
    try:
        return main(arguments)
    except SystemExit as exit_:
        return exit_.code


def test_check_needs_neither_model_nor_data_and_writes_nothing(write, capsys):
    path = write(**LORA, flash_attention=True, wandb_name=None)
    assert main(["config", "check", path, "--lora_r=4"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for words in ("no effect (1)", "flash_attention", "lora_r: 4\n", "needs the data"):
        assert words in captured.out
    assert list(Path.cwd().iterdir()) == []


def test_check_reports_all_errors_at_once_with_file_and_line(write, capsys):
    path = write(**MINIMAL, lora_rr=1, rl="dpo", warmup_steps=1.5)
    assert main(["config", "check", path, "--seed=-1"]) == 2
    captured = capsys.readouterr()
    lines = Path(path).read_text().splitlines()
    for key in ("lora_rr", "rl", "warmup_steps"):
        number = next(i for i, line in enumerate(lines, 1) if line.startswith(f"{key}:"))
        assert f"jaxlora: error: {path}:{number}: {key}: " in captured.err
    assert "jaxlora: error: --seed: expected" in captured.err
    assert captured.err.count("\n") == 4
    assert "refused (4)" in captured.out
    assert "resolved" not in captured.out


def test_schema_is_printed_as_json(capsys):
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["lora_r"]


def test_init_takes_answers_as_flags_or_asks_for_them(write, capsys, monkeypatch):
    flags = ["--model", "m", "--data=owner/name"]
    assert main(["init", "a.yml", *flags, "--hardware=cpu"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("cpu\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["init", "b.yml", *flags]) == 0
    assert "Hardware (cpu," in capsys.readouterr().out
    a, b = (Path(name).read_text() for name in ("a.yml", "b.yml"))
    assert a == b.replace("b.yml", "a.yml").replace("outputs/b", "outputs/a")
    assert main(["config", "check", "a.yml"]) == 0


def test_init_without_a_terminal_names_the_missing_flag(write, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["init", "--model=m"]) == 2
    assert "jaxlora: error: init: --data is missing" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_fetched_configurations_load_from_anywhere(write, capsys):
    assert main(["fetch", "configs", "--to", "mine/configs"]) == 0
    printed = capsys.readouterr().out.split()
    shipped = {path.name for path in (REPOSITORY / "configs").iterdir() if path.is_file()}
    assert {Path(path).name for path in printed} == shipped
    for path in printed:
        load_config(path)
    quickstart = load_config("mine/configs/quickstart.yml")
    assert Path(quickstart.base_model, "config.json").is_file()
    assert Path(quickstart.datasets[0].path).is_file()


def test_fetch_overwrites_nothing(write, capsys):
    Path("configs").mkdir()
    Path("configs/quickstart.yml").write_text("mine")
    assert main(["fetch", "configs"]) == 2
    assert "quickstart.yml: is already there" in capsys.readouterr().err
    assert [path.name for path in Path("configs").iterdir()] == ["quickstart.yml"]


def test_the_package_that_is_built_holds_the_configurations(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    built = {path.name for path in (tmp_path / "jaxlora" / "configs").iterdir()}
    assert built >= {path.name for path in (REPOSITORY / "configs").iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "check", "my.yml", "other.yml"], "other.yml: stray argument"),
        (["train", "my.yml", "--dry-run", "--seed=1", "--seed=2"], "--seed: given twice"),
        (["train", "my.yml", "--lora-r=1", "--lora_r=2"], "given twice"),
        (["merge", "a", "--output", "b", "--output=c"], "--output: given twice"),
        (["train", "my.yml", "--dry-run", "--dry_run"], "given twice"),
        (["init", "a.yml", "b.yml"], "unknown argument b.yml"),
        (["init", "a.yml", "--modl=x"], "unknown argument --modl"),
        (["merge", "a", "--out", "b"], "required: --output"),
        (["config", "schema", "x"], "unknown argument x"),
        (["config"], "required: PART"),
    ],
)
def test_stray_shortened_and_repeated_arguments_are_refused(arguments, words, write, capsys):
    write(**MINIMAL)
    assert status([word.replace("my.yml", "../my.yml") for word in arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_a_misspelt_environment_variable_is_refused(write, capsys, monkeypatch):
    monkeypatch.setenv("JAXLORA_CAHCE", "/elsewhere")
    assert main(["config", "check", write(**MINIMAL)]) == 2
    assert "JAXLORA_CAHCE is no variable of jaxlora" in (error := capsys.readouterr().err)
    assert 'Did you mean "JAXLORA_CACHE"?' in error


def test_dry_run_says_the_numbers_of_the_run_and_writes_nothing(
    write, tmp_path, write_tiny_llama, capsys, monkeypatch
):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    base = write_base(write_tiny_llama, tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    kind = {"field_instruction": "question", "field_output": "answer", "format": "{instruction}\n"}
    path = write(
        **LORA
        | {"base_model": str(base), "datasets": [{"path": str(rows), "type": kind}]}
        | {"sequence_len": 64, "micro_batch_size": 4, "num_epochs": 2, "val_set_size": 4}
    )
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", path, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("steps            10", "24 of 24 rows kept", "resolved configuration"):
        assert words in out
    assert "needs the data" not in out
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["train", path, "--dry-run", "--base_model=nowhere/./x"]) == 2


def test_help_is_there_in_a_tenth_of_a_second():
    def cpu_s():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    def run():
        before = cpu_s()
        subprocess.run([sys.executable, "-m", "jaxlora.cli", "--help"], capture_output=True)
        return cpu_s() - before

    # Processor time, and the best of several: other programs share the machine.
    assert min(run() for _ in range(5)) <= 0.1


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "jaxlora.cli", "config", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
