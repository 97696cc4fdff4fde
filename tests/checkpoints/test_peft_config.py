import json

import pytest

from jaxlora.checkpoints.peft_config import read_config, write_config
from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig, match


@pytest.fixture
def written(tmp_path):
    """Returns what is written for a config on two leaves that share their last name."""

    def get(modules, config):
        path = tmp_path / "adapter_config.json"
        targets = match(modules, config, [p for p, names in modules.items() if len(names) > 1])
        write_config(path, targets, config, base_name="x", revision=None)
        return json.loads(path.read_text()), targets, read_config(path)

    return get


def test_leaves_that_share_a_last_name_are_told_apart_by_whole_paths(written):
    modules = {
        "e": ["enc.0.q", "enc.1.q"],
        "d": ["dec.0.q", "dec.1.q"],
        "o": ["enc.0.o", "enc.1.o"],
    }
    config = LoraConfig(r=4, target_modules=("q", "o"), rank_pattern={r"enc\.\d\.q": 2})
    content, targets, again = written(modules, config)
    assert content["target_modules"] == ["dec.0.q", "dec.1.q", "enc.0.q", "enc.1.q", "o"]
    assert content["rank_pattern"] == {"enc.0.q": 2, "enc.1.q": 2}
    assert match(modules, again, modules) == targets


def test_alpha_is_written_as_given_not_divided_back(written):
    # 0.7 / sqrt(3) * sqrt(3) is not 0.7 in floating point.
    config = LoraConfig(r=3, alpha=0.7, use_rslora=True, target_modules=("q",))
    content, _, again = written({"e": ["enc.0.q", "enc.1.q"]}, config)
    assert content["lora_alpha"] == 0.7
    assert content["alpha_pattern"] == {}
    assert again.alpha == 0.7


def test_minimal_config_gets_pefts_defaults(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "target_modules": ["v", "q"], "r": 4}')
    assert read_config(path) == LoraConfig(r=4, alpha=8.0, target_modules=("q", "v"))


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    path = tmp_path / "adapter_config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"adapter_config.json: (not valid JSON|expected a JSON)"):
        read_config(path)
