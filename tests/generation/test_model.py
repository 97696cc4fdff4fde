"""What `load` puts together: base, adapter, tokenizer, end tokens, quantization."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import tiny_run, write_base

from jaxlora.checkpoints.load import QuantSpec
from jaxlora.core.errors import UserError
from jaxlora.generation.model import load, locate
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.ops.quantize import QuantizedArray

SHORT = SamplingOptions(max_new_tokens=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_tiny_llama):
    return tiny_run(tmp_path_factory, write_tiny_llama)


def adapter_alone(run, folder):
    """Copies the adapter as somebody else's folder would hold it: no run, no tokenizer."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run.folder / name, folder)
    return folder


def is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


def formats(model):
    """The quantized formats among the weights of a model."""
    leaves = jax.tree.leaves(model.params, is_leaf=is_quantized)
    return {leaf.format for leaf in leaves if is_quantized(leaf)}


def test_a_lone_adapter_names_its_base(run):
    assert locate(run.folder, None) == (run.base, run.folder)
    assert locate(run.base, None) == (run.base, None)
    assert locate(run.base, run.folder) == (run.base, run.folder)


def test_the_adapter_changes_the_answers(run):
    prompts = ["red cat", "blue house"]
    adapted = load(run.folder).generate(prompts, SHORT)
    assert load(run.base, run.folder).generate(prompts, SHORT) == adapted
    assert load(run.base).generate(prompts, SHORT) != adapted


def test_base_is_quantized_as_the_run_did(run):
    assert formats(load(run.folder)) == {"int4"}
    assert formats(load(run.base)) == set()


def test_an_adapter_keeps_the_record_of_its_base_wherever_it_goes(run, tmp_path):
    assert formats(load(adapter_alone(run, tmp_path))) == {"int4"}


def test_an_adapter_without_a_record_leaves_the_base_plain(run, tmp_path):
    file = adapter_alone(run, tmp_path) / "adapter_model.safetensors"
    save_file(load_file(file), file)
    assert formats(load(tmp_path)) == set()


def test_quantization_asked_for_wins(run):
    assert formats(load(run.folder, quantization=QuantSpec("int8"))) == {"int8"}


def test_tokenizer_beside_the_adapter_wins(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "adapter")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    model = load(folder)
    assert model.tokenizer.chat_template == template
    assert load(run.base).tokenizer.chat_template != template


def test_without_tokenizer_beside_the_adapter_the_bases_serves(run, tmp_path):
    tokenizer = load(adapter_alone(run, tmp_path)).tokenizer
    assert tokenizer.chat_template == load(run.base).tokenizer.chat_template


@pytest.mark.parametrize(
    ("written", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())], ids=str
)
def test_end_tokens_of_the_generation_config(written, expected, tmp_path, write_tiny_llama):
    base = write_base(write_tiny_llama, tmp_path / "base")
    text = json.dumps({} if written is None else {"eos_token_id": written})
    (base / "generation_config.json").write_text(text)
    assert load(base).eos_ids == expected


def test_an_answer_stops_at_an_end_token_of_the_generation_config(tmp_path, write_tiny_llama):
    base = write_base(write_tiny_llama, tmp_path / "base")
    model = load(base)
    (answer,) = model.generate(["red cat"], SHORT, raw=True)
    assert answer
    every_id = list(range(model.transformer.cfg.vocab_size))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": every_id}))
    assert load(base).generate(["red cat"], SHORT, raw=True) == [""]


def test_an_adapter_of_another_base_is_refused(run, tmp_path, write_tiny_llama):
    other = write_base(write_tiny_llama, tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="another base model"):
        load(other, run.folder)


def test_dtype_is_that_of_the_plain_weights(run):
    model = load(run.base, dtype="bfloat16")
    assert {str(np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}


def test_chat_answers_until_the_input_ends(run):
    lines, written = iter(["red cat"]), []

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    load(run.folder).chat(SHORT, read, written.append)
    assert "".join(written).strip()
