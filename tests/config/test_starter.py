import itertools
import json

import pytest

from jaxlora.config import starter
from jaxlora.config.load import load_config
from jaxlora.config.notes import notes
from jaxlora.config.settings import train_specs
from jaxlora.core.errors import UserError

ROWS = {
    "messages": {"messages": [{"role": "user", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "segments": {"segments": [{"text": "a", "label": True}]},
    "text": {"text": "a"},
    "pair": {"question": "a", "answer": "b"},
}
KINDS = {"alpaca": "alpaca", "segments": "input_output", "text": "completion"}
MODELS = ("Qwen/Qwen3-0.6B", "folder: with # signs", "7")


@pytest.mark.parametrize(
    ("hardware", "model", "rows"), itertools.product(starter.HARDWARE, MODELS, [*ROWS, "hub"])
)
def test_every_combination_of_answers_is_a_configuration(hardware, model, rows, tmp_path):
    data = "tatsu-lab/alpaca"
    if rows != "hub":
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(ROWS[rows]) + "\n")
        data = str(path)
    file = tmp_path / "my.yml"
    starter.write(str(file), model=model, data=data, hardware=hardware)
    config = load_config(file)
    assert (config.base_model, config.datasets[0].path) == (model, data)
    assert notes(config) == []
    assert config.output_dir == "outputs/my"
    (spec,) = train_specs(config)
    if rows == "pair":
        assert (spec.type["field_instruction"], spec.type["field_output"]) == ("question", "answer")
    else:
        assert spec.type == KINDS.get(rows, "chat_template")
    columns = {"messages": "messages", "sharegpt": "conversations"}
    assert spec.field_messages == columns.get(rows, "messages")
    if rows == "sharegpt":
        assert spec.message_property_mappings == {"role": "from", "content": "value"}
    assert file.read_text().count("#") >= 6
    assert len(file.read_text().splitlines()) < 40


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"hardware": "gpu-24g"}, 'Did you mean "gpu-24gb"'),
        ({"model": ""}, "no model was given"),
        ({"data": "./nowhere.jsonl"}, "does not exist"),
    ],
)
def test_unusable_answer_is_refused_and_nothing_written(answers, words, tmp_path):
    good = {"model": "m", "data": "owner/name", "hardware": "cpu"}
    with pytest.raises(UserError, match=words):
        starter.write(str(tmp_path / "my.yml"), **(good | answers))
    assert not list(tmp_path.iterdir())


def test_rows_of_no_known_type_are_refused_by_their_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"left": 1, "right": 2}\n')
    with pytest.raises(UserError, match=r"columns \(left, right\) tell no type"):
        starter.starter("my.yml", model="m", data=str(path), hardware="cpu")


def test_a_file_that_is_there_is_kept(tmp_path):
    file = tmp_path / "my.yml"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"my\.yml: is already there"):
        starter.write(str(file), model="m", data="owner/name", hardware="cpu")
    assert file.read_text() == "mine"
