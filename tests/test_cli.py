"""Every command answers; a mistake of the user is one line and exit status 2."""

import filecmp
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tiny_runs import tiny_run, write_base

from jaxlora.cli import main

COMMANDS = (
    "train",
    "evaluate",
    "preprocess",
    "generate",
    "chat",
    "merge",
    "export",
    "verify",
    "inspect",
    "init",
    "config",
    "fetch",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_tiny_llama):
    return tiny_run(tmp_path_factory, write_tiny_llama)


@pytest.fixture
def config_file(run, tmp_path):
    """``config_file(**changes) -> str``: the run's keys as YAML, its output in `tmp_path`."""

    def write(**changes):
        keys = {**run.keys, "output_dir": str(tmp_path / "out"), **changes}
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_of_every_command_exits_0(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert " ".join(["usage: jaxlora", *arguments]) in printed


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "model", "prompt", "--max_new_token_count=4"],
        ["inspect", "model", "--lora_r=4"],
        ["merge", "model", "--output", "folder", "--format", "gguf"],
        ["fly"],
        [],
    ],
)
def test_unknown_argument_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def unknown_key(run, folder):
    return {"lora_rank": 4}


def missing_model(run, folder):
    return {"base_model": str(folder / "nowhere")}


def unsupported_architecture(run, folder):
    base = folder / "base"
    base.mkdir()
    config = json.loads((run.base / "config.json").read_text())
    config |= {"architectures": ["BloomForCausalLM"], "model_type": "bloom"}
    (base / "config.json").write_text(json.dumps(config))
    return {"base_model": str(base)}


def no_target(run, folder):
    return {"lora_target_linear": False, "lora_target_modules": ["query_proj"]}


def _data(run, folder, text):
    path = folder / "rows.jsonl"
    path.write_text(text)
    return {"datasets": [{**run.keys["datasets"][0], "path": str(path)}]}


def empty_data(run, folder):
    return _data(run, folder, "")


def malformed_line(run, folder):
    return _data(run, folder, '{"question": "a", "answer": "b"}\n{"question": "c", "answer"\n')


# What the one line must name, however it is worded.
BAD_INPUT = {
    unknown_key: "lora_rank",
    missing_model: "nowhere",
    unsupported_architecture: "Bloom",
    no_target: "query_proj",
    empty_data: "rows.jsonl",
    malformed_line: "rows.jsonl:2",
}


def assert_one_line(capsys, names):
    """Expects exactly one error line that holds `names`, and no traceback."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("jaxlora: error:")]
    assert len(lines) == 1, captured.err
    assert names in lines[0]
    assert "Traceback" not in captured.out + captured.err


@pytest.mark.parametrize("spoil", BAD_INPUT, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_one_line_and_leaves_no_output(spoil, run, config_file, tmp_path, capsys):
    written = config_file(**spoil(run, tmp_path))
    assert main(["train", written]) == 2
    assert_one_line(capsys, BAD_INPUT[spoil])
    assert not (tmp_path / "out").exists()


def test_used_output_folder_is_one_line_and_untouched(config_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.safetensors").write_text("mine")
    assert main(["train", config_file()]) == 2
    assert_one_line(capsys, "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter_model.safetensors"]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("command", ["generate", "inspect", "verify"])
@pytest.mark.parametrize("text", ["{", "[]", '"text"', ""])
def test_malformed_adapter_config_is_one_line(command, text, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(text)
    prompt = ["prompt"] if command == "generate" else []
    assert main([command, str(tmp_path), *prompt]) == 2
    assert_one_line(capsys, "adapter_config.json")


def test_adapter_without_base_is_one_line(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["generate", str(tmp_path), "prompt"]) == 2
    assert_one_line(capsys, "adapter_config.json")


@pytest.mark.parametrize(
    "arguments", [["generate", "{}", "prompt"], ["inspect", "{}"], ["export", "{}", "--output=x"]]
)
def test_missing_folder_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([text.format(tmp_path / "nowhere") for text in arguments]) == 2
    assert_one_line(capsys, "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", ["flags first", "prompt first"])
def test_generate_takes_flags_and_prompts_in_any_order(order, run, capsys):
    flags, prompts = ["--max_new_tokens", "4"], ["red cat"]
    rest = flags + prompts if order == "flags first" else prompts + flags
    assert main(["generate", str(run.folder), *rest]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    answer = captured.out
    main(["generate", str(run.folder), *prompts, "--max_new_tokens=1"])
    shorter = capsys.readouterr().out.removesuffix("\n")
    assert answer.startswith(shorter)
    assert len(answer) > len(shorter) + 1


def test_generate_reads_prompts_from_stdin(run, capsys, monkeypatch):
    command = ["generate", str(run.folder), "--max_new_tokens=4"]
    main([*command, "red", "blue"])
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("red\nblue\n"))
    assert main(command) == 0
    assert capsys.readouterr().out == expected


def test_inspect_prints_rows(run, capsys):
    assert main(["inspect", str(run.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("adapter ") and str(run.folder) in line for line in lines)
    starts = {len(line) - len(line.partition("  ")[2].lstrip()) for line in lines}
    assert len(starts) == 1, "values stand in one column"


def test_export_equals_the_adapter_of_the_run(run, tmp_path, capsys):
    assert main(["export", str(run.folder), "--output", str(tmp_path / "exported")]) == 0
    assert str(tmp_path / "exported") in capsys.readouterr().out
    names = [path.name for path in (tmp_path / "exported").iterdir()]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(names)
    same, other, failed = filecmp.cmpfiles(run.folder, tmp_path / "exported", names, shallow=False)
    assert (sorted(same), other, failed) == (sorted(names), [], [])


def test_preprocess_shows_lengths_colours_and_why_it_tokenized(
    run, config_file, tmp_path, capsys, monkeypatch
):
    picture = tmp_path / "lengths.png"
    cache = f"--dataset_prepared_path={tmp_path / 'cache'}"
    command = ["preprocess", config_file(val_set_size=0), "--explain", cache]
    assert main([*command, f"--output={picture}"]) == 0
    printed = capsys.readouterr().out
    assert "no entry in the cache" in printed
    assert sum(int(n) for n in re.findall(r"tokens +#* +(\d+)$", printed, re.M)) == 24
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "\033" not in printed
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main([*command, "--excess_length_strategy=truncate"]) == 0
    printed = capsys.readouterr().out
    assert "options.excess_length_strategy: truncate, was drop" in printed
    assert "\033[32m" in printed
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "the tokens were in the cache" in printed
    assert "\033" not in printed
    assert main([*command, f"--output={tmp_path}"]) == 2


def test_preprocess_prints_the_preview(run, config_file, tmp_path, capsys):
    first = json.loads(run.rows.read_text().splitlines()[0])
    assert main(["preprocess", config_file(val_set_size=0), "--preview=2"]) == 0
    printed = capsys.readouterr().out
    assert "24 of 24 rows kept" in printed
    assert "example 2" in printed
    assert "example 3" not in printed
    _, _, example = printed.partition("example 1")[2].partition("\n")
    question, _, answer = example.partition("[")
    assert first["question"] in question
    assert answer.startswith(first["answer"])
    assert not (tmp_path / "out").exists()


def test_overrides_reach_the_run(config_file, capsys):
    assert main(["preprocess", config_file(), "--sequence_len=0"]) == 2
    assert_one_line(capsys, "sequence_len")


def test_evaluate_scores_the_adapter_of_the_output_folder(run, capsys):
    written = str(run.folder / "config.yml")
    assert main(["evaluate", written]) == 0
    own = capsys.readouterr().out
    assert str(run.folder) in own
    records = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    recorded = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert f"{recorded[-1]:.4f}" in own


def write_mlx_adapter(run, folder):
    """The run's adapter as mlx-lm would have saved it."""
    folder.mkdir()
    tensors = {}
    for name, values in load_file(run.folder / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").removesuffix(".weight")
        tensors[name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = values.T.copy()
    save_file(tensors, folder / "adapters.safetensors")
    options = {"rank": run.keys["lora_r"], "dropout": 0.0}
    options["scale"] = run.keys["lora_alpha"] / run.keys["lora_r"]
    content = {"model": str(run.base), "num_layers": -1, "lora_parameters": options}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return str(folder)


def test_an_mlx_adapter_is_inspected_used_and_exported(run, tmp_path, capsys):
    mlx, exported = write_mlx_adapter(run, tmp_path / "mlx"), tmp_path / "exported"
    assert main(["inspect", mlx]) == 0
    assert "MLX's layout" in capsys.readouterr().out
    prompt = ["red cat", "--max_new_tokens=8", "--quantization=int4"]
    assert main(["generate", mlx, *prompt]) == 0
    answer = capsys.readouterr().out
    assert main(["generate", str(run.folder), *prompt]) == 0
    assert capsys.readouterr().out == answer
    assert main(["verify", mlx]) == 2
    assert_one_line(capsys, "jaxlora export")
    assert main(["export", mlx, "--output", str(exported)]) == 0
    assert f"adapter exported: {exported}" in capsys.readouterr().out
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (exported, run.folder))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    content = json.loads((exported / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(run.base)
    assert content["lora_alpha"] == run.keys["lora_alpha"]


def test_an_adapter_that_names_no_base_asks_for_it(run, tmp_path, capsys):
    mlx = Path(write_mlx_adapter(run, tmp_path / "mlx"))
    content = json.loads((mlx / "adapter_config.json").read_text())
    content.pop("model")
    (mlx / "adapter_config.json").write_text(json.dumps(content))
    exported = str(tmp_path / "exported")
    assert main(["export", str(mlx), "--output", exported]) == 2
    assert_one_line(capsys, "--base")
    assert not Path(exported).exists()
    assert main(["export", str(mlx), "--base", str(run.base), "--output", exported]) == 0


def test_merge_writes_gguf_that_generates(run, tmp_path, config_file, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("torch")  # transformers reads a tokenizer from GGUF with it
    base, file = tmp_path / "base", tmp_path / "merged.gguf"
    shutil.copytree(run.base, base)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run.folder / name, adapter)
    merge = ["merge", str(base), "--adapter", str(adapter)]
    assert main([*merge, "--output", str(file), "--gguf", "F16"]) == 0
    printed = capsys.readouterr().out
    assert str(file) in printed
    assert "largest difference" in printed
    assert main([*merge, "--output", str(tmp_path / "hf"), "--no_compare"]) == 0
    assert main(["inspect", str(file)]) == 0
    assert "2 layers x 64" in capsys.readouterr().out
    answers = []
    for model in (file, tmp_path / "hf"):
        assert main(["generate", str(model), "red cat", "--raw", "--max_new_tokens=8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    keys = {"base_model": str(file), "output_dir": str(tmp_path / "out"), "max_steps": 1}
    assert main(["train", config_file(**keys)]) == 0, "a GGUF file is a base model"
    assert main(["verify", str(tmp_path / "out")]) == 2
    capsys.readouterr()
    # Back to a folder, and a model alone to GGUF.
    assert main(["merge", str(file), "--output", str(tmp_path / "b.gguf"), "--gguf", "Q8_0"]) == 0
    again = ["merge", str(file), "--adapter", str(adapter), "--output", str(tmp_path / "back")]
    assert main([*again, "--dtype=float32", "--no_compare"]) == 2  # another base than its own
    assert_one_line(capsys, "another base model")
    back = ["merge", str(tmp_path / "out"), "--output", str(tmp_path / "back")]
    assert main([*back, "--no_compare"]) == 0
    assert main(["generate", str(tmp_path / "back"), "red", "--max_new_tokens=4"]) == 0


def test_merge_to_gguf_refuses_before_it_loads(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.delattr("jaxlora.merging.load_base")
    output = str(tmp_path / "merged.gguf")
    # The tiny Llama's tokenizer splits text by a rule of its own.
    assert main(["merge", str(run.folder), "--output", output, "--gguf", "Q8_0"]) == 2
    assert_one_line(capsys, "splits text by a rule that llama.cpp has no name for")
    assert not list(tmp_path.iterdir())


def test_merge_then_generate_answers(run, tmp_path, write_tiny_llama, capsys):
    base = write_base(write_tiny_llama, tmp_path / "base")  # the run's base, elsewhere
    merged = str(tmp_path / "merged")
    assert main(["merge", str(base), "--adapter", str(run.folder), "--output", merged]) == 0
    printed = capsys.readouterr().out
    assert merged in printed
    assert "on disk (written): largest difference" in printed
    assert "saw it (not written): largest difference" in printed
    assert main(["generate", merged, "red", "--max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.strip()


def test_interrupt_exits_130(run, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxlora.api.inspect", stop)
    assert main(["inspect", str(run.folder)]) == 130
    assert "Traceback" not in capsys.readouterr().err
