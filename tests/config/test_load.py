import os

import pytest
import yaml
from minimal_configs import LORA, MINIMAL

from jaxlora.config.document import parse_yaml
from jaxlora.config.load import dump_config, load_config
from jaxlora.core.errors import UserError


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"learning_rate": "2e-5", "wandb_name": "2e-5", "eval_strategy": False},
        {"flash_attention": True, "dp_shard_size": 2, "strict": False},
        {"mesh": {"tensor": 2}, "special_tokens": {"pad_token": "</s>"}, "val_set_size": 0.1},
        {"lora_target_modules": ["q_proj"], "peft_layers_to_transform": [0, 1]},
        {"datasets": [{"path": "x", "type": {"field_output": "ref"}, "roles": {"user": ["me"]}}]},
        {"datasets": [{"path": "x", "type": "chat_template", "message_field_role": "from"}]},
    ],
)
def test_dumped_configuration_loads_back_equal(extra):
    config = load_config(LORA | extra)
    assert load_config(parse_yaml(dump_config(config), "dump")[0]) == config


def test_null_means_default():
    nulls = {"lora_r": None, "seed": None, "special_tokens": {"pad_token": None}, "gptq": None}
    assert load_config(MINIMAL | nulls) == load_config(MINIMAL)


def test_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(MINIMAL).seed = 1


def test_paths_are_found_from_the_working_directory_then_beside_the_file(tmp_path, monkeypatch):
    folder, here = tmp_path / "configs", tmp_path / "here"
    for name in ("configs", "here", "model", "here/both", "configs/both"):
        (tmp_path / name).mkdir()
    (folder / "data.jsonl").touch()
    values = MINIMAL | {"base_model": "../model", "tokenizer_config": "both", "output_dir": "out"}
    values["datasets"] = [
        {"path": "data.jsonl", "type": "alpaca"},
        {"path": "owner/data", "data_files": ["data.jsonl", "none.jsonl"], "type": "alpaca"},
    ]
    monkeypatch.chdir(here)
    (tmp_path / "model").rename(tmp_path / "configs" / "model")
    config = load_config(write(folder / "run.yml", values | {"base_model": "model"}))
    assert config.base_model == str(folder / "model")
    assert config.tokenizer_config == "both"
    assert config.output_dir == "out"
    assert config.datasets[0].path == str(folder / "data.jsonl")
    assert config.datasets[1].path == "owner/data"
    assert config.datasets[1].data_files == (str(folder / "data.jsonl"), "none.jsonl")


def test_override_paths_are_relative_to_the_working_directory_only(tmp_path):
    (tmp_path / "beside").mkdir()
    path = write(tmp_path / "run.yml", MINIMAL)
    assert load_config(path, ["--base_model=beside"]).base_model == "beside"


def test_problem_names_its_line_or_its_flag(tmp_path):
    path = write(tmp_path / "run.yml", MINIMAL | {"lora_r": 0})
    line = path.read_text().splitlines().index("lora_r: 0") + 1
    with pytest.raises(UserError) as error:
        load_config(path, ["--seed=-1"])
    lines = str(error.value).splitlines()
    assert any(each.startswith(f"{path}:{line}: lora_r: expected") for each in lines)
    assert any(each.startswith("--seed: expected") for each in lines)
    assert len(lines) == 2


def test_bare_pathlike_and_text_are_the_same(tmp_path):
    path = write(tmp_path / "run.yml", MINIMAL)
    assert load_config(path) == load_config(os.fspath(path)) == load_config(MINIMAL)
