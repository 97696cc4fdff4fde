"""The verbs take mappings, files and configs alike, and give what the command gives."""

import subprocess
import sys

import pytest
from tiny_runs import tiny_run

import jaxlora
from jaxlora import api


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_tiny_llama):
    return tiny_run(tmp_path_factory, write_tiny_llama)


@pytest.fixture(scope="module")
def from_mapping(run, tmp_path_factory):
    """A run of one step: the mapping says three, an override says one."""
    folder = tmp_path_factory.mktemp("api") / "mapping"
    keys = {**run.keys, "output_dir": str(folder)}
    return api.train(keys, "--max_steps=1", quiet=True)


def test_overrides_win_over_the_mapping(run, from_mapping):
    assert run.keys["max_steps"] != 1
    assert from_mapping.steps == 1
    assert [line["step"] for line in from_mapping.history if "loss" in line] == [1]


def test_a_config_trains_as_its_mapping_does(run, from_mapping, tmp_path, capsys):
    config = api.load_config({**run.keys, "output_dir": str(tmp_path / "out"), "max_steps": 1})
    result = api.train(config, quiet=True)
    assert capsys.readouterr().out == "", "quiet"
    assert result.output_dir == tmp_path / "out"
    adapters = [
        (each.output_dir / "adapter_model.safetensors").read_bytes()
        for each in (result, from_mapping)
    ]
    assert adapters[0] == adapters[1]


def test_overrides_of_a_config_leave_it_alone(run, tmp_path):
    config = api.load_config({**run.keys, "output_dir": str(tmp_path / "out")})
    with pytest.raises(jaxlora.UserError, match="lora_r"):
        api.train(config, "--lora_r=0", quiet=True)
    assert config.lora_r == run.keys["lora_r"]
    assert not (tmp_path / "out").exists()


def test_evaluate_scores_the_adapter_it_is_given(run):
    base = api.evaluate(run.keys)
    adapted = api.evaluate(run.keys, adapter=run.folder)
    assert adapted.loss < base.loss
    assert adapted.score is None


def test_evaluate_agrees_with_the_run(run, from_mapping):
    last = [line["eval_loss"] for line in from_mapping.history if "eval_loss" in line][-1]
    again = api.evaluate(run.keys, adapter=from_mapping.output_dir)
    assert again.loss == pytest.approx(last, rel=1e-6)  # the same program on the same numbers


def test_generate_answers_one_prompt_or_several(run):
    both = api.generate(run.folder, ["red cat", "blue"], max_new_tokens=4)
    assert len(both) == 2
    assert api.generate(run.folder, "red cat", max_new_tokens=4) == both[:1]


def test_generate_finds_the_same_model_by_both_names(run):
    alone = api.generate(run.folder, "red cat", max_new_tokens=8)
    named = api.generate(run.base, "red cat", adapter=run.folder, max_new_tokens=8)
    assert alone == named
    assert api.generate(run.base, "red cat", max_new_tokens=8) != alone


def test_raw_leaves_the_chat_template_out(run):
    framed = api.generate(run.folder, "red cat", max_new_tokens=8)
    raw = api.generate(run.folder, "red cat", raw=True, max_new_tokens=8)
    assert raw != framed


def test_preprocess_returns_tables_and_tokenizer(run):
    prepared, tokenizer = api.preprocess(run.keys)
    assert len(prepared.train) == 20  # of 24 rows, 4 are held out
    assert tokenizer.encode("red")


@pytest.mark.parametrize("name", jaxlora.__all__)
def test_every_public_name_is_there(name):
    assert getattr(jaxlora, name) is not None


@pytest.mark.parametrize("name", sorted(set(api.__all__) & set(jaxlora.__all__)))
def test_the_package_exports_the_verbs_of_the_api(name):
    assert getattr(jaxlora, name) is getattr(api, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="trian"):
        jaxlora.trian  # noqa: B018


def test_the_import_is_lazy():
    heavy = ("jax", "flax", "transformers", "torch", "pydantic", "jaxlora.api")
    script = (
        "import sys, jaxlora, jaxlora.cli; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
