import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from minimal_configs import LORA, MINIMAL

from jaxlora.config import derived
from jaxlora.config.load import dump_config, load_config
from jaxlora.config.notes import notes
from jaxlora.config.settings import data_options, held_out_specs, lora_config, train_specs
from jaxlora.data.prepare import prepare
from jaxlora.data.spec import Labels
from jaxlora.data.tokenizer import load_tokenizer

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".yml", ".py"))


def test_the_shipped_set_is_complete():
    names = {path.name for path in FILES}
    assert names >= {
        "quickstart.yml",
        "llama-3-8b-lora.yml",
        "llama-3-8b-qlora.yml",
        "llama-2-7b-qlora.yml",
        "mistral-7b-lora.yml",
        "mistral-7b-qlora.yml",
        "full-fine-tune.yml",
        "continued-pretraining.yml",
        "encoder-mlm.yml",
        "classification.yml",
        "int8.yml",
        "chat.yml",
        "tool-use.yml",
        "long-context.yml",
        "llama_3_8b_qlora.py",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_file_loads_without_a_note_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    assert notes(config) == []
    assert load_config(config.model_dump(exclude_unset=True, exclude={"foreign"})) == config
    assert dump_config(config)
    assert train_specs(config)
    assert data_options(config).sequence_len == config.sequence_len
    assert (lora_config(config) is None) == (config.adapter is None)
    assert derived.total_steps(config, 10) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_file_says_how_to_run_itself(path):
    head = path.read_text()[:600]
    assert re.search(rf"Command: +jaxlora train configs/{re.escape(path.name)}", head)
    assert "Hardware:" in head
    # What is expected of time, loss and memory, or that it is not known.
    assert re.search(r"\d (s|min|minutes)\b|Not run here", head)
    assert re.search(r"(loss|accuracy) .*\d|Not run here", head)
    assert re.search(r"\d (MiB|GiB)|memory are not known", head)


# Those that need no network: the model is the embedded one, the data are bundled.
LOCAL = [path for path in FILES if "jaxlora/assets" in path.read_text()]


@pytest.mark.parametrize("path", LOCAL, ids=lambda path: path.name)
def test_local_file_prepares_its_data_and_trains_every_answer(path, tmp_path):
    config = load_config(path)
    tokenizer = load_tokenizer(Path(config.base_model))
    labels = Labels(3, ("gained", "kept", "parted")) if config.num_labels else None
    options = dataclasses.replace(
        data_options(config, labels), dataset_prepared_path=str(tmp_path / "cache")
    )
    report = prepare(train_specs(config), held_out_specs(config), options, tokenizer).report
    for source in (*report.train_sources, *report.test_sources):
        assert source.kept == source.read > 0
        assert source.truncated == source.divided == 0
    # A classifier learns its labels, not its tokens.
    assert report.train.trained_tokens > 0 or report.train.labels


def test_quickstart_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(FOLDER / "quickstart.yml")
    assets = FOLDER.parent / "jaxlora" / "assets"
    assert config.base_model == str(assets / "tiny-llama")
    assert config.datasets[0].path == str(assets / "quickstart" / "train.jsonl")
    assert config.test_datasets[0].path == str(assets / "quickstart" / "test.jsonl")
    assert config.output_dir == "outputs/quickstart"


def test_python_and_yaml_files_of_one_run_are_equal():
    assert load_config(FOLDER / "llama_3_8b_qlora.py") == load_config(
        FOLDER / "llama-3-8b-qlora.yml"
    )


def test_the_examples_of_new_tokens_load():
    page = (FOLDER.parent / "docs" / "new-tokens.md").read_text()
    examples = [yaml.safe_load(text.partition("```")[0]) for text in page.split("```yaml\n")[1:]]
    assert len(examples) == 4
    for example in examples:
        load_config({**(LORA if "adapter" in example else MINIMAL), **example})
