"""A mistake of the user is one line, and leaves no output folder behind."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.training.loop import train


class Case:
    """A good run in folders of its own, for a test to spoil."""

    def __init__(self, keys, folder, write_base):
        self.keys = {**keys, "max_steps": 1, "output_dir": str(folder / "out")}
        self.folder, self._write_base = folder, write_base

    def base(self, **changes):
        folder = self._write_base(
            self.folder / f"base{len(list(self.folder.iterdir()))}", **changes
        )
        self.keys["base_model"] = str(folder)
        return folder

    def rows(self, text):
        path = self.folder / "rows.jsonl"
        path.write_text(text)
        self.keys["datasets"] = [{**self.keys["datasets"][0], "path": str(path)}]

    def edit_config(self, **changes):
        path = self.base() / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def missing_model(case):
    case.keys["base_model"] = str(case.folder / "nowhere")


def missing_shard(case):
    folder = case.base()
    tensors = load_file(folder / "model.safetensors")
    index = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    index["model.norm.weight"] = "model-00002-of-00002.safetensors"
    last = tensors.pop("model.norm.weight")
    del last
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def truncated_weights(case):
    path = case.base() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_tensor(case):
    path = case.base() / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def wrong_shape(case):
    case.edit_config(intermediate_size=104)


def unknown_architecture(case):
    case.edit_config(architectures=["BloomForCausalLM"], model_type="bloom")


def large_tokenizer(case):
    case.base(vocab_size=300)


def no_tokenizer(case):
    (case.base() / "tokenizer.json").unlink()


def adapter_of_another_base(case):
    adapter = case.folder / "adapter"
    train(load_config({**case.keys, "output_dir": str(adapter)}), quiet=True)
    case.base(seed=5)
    case.keys["lora_model_dir"] = str(adapter)


def adapter_of_another_shape(case):
    adapter = case.folder / "adapter"
    train(load_config({**case.keys, "output_dir": str(adapter)}), quiet=True)
    case.base(intermediate_size=128)
    case.keys["lora_model_dir"] = str(adapter)


def missing_adapter(case):
    case.keys["lora_model_dir"] = str(case.folder / "nowhere")


def no_target(case):
    del case.keys["lora_target_linear"]
    case.keys["lora_target_modules"] = ["query_proj"]


def empty_data(case):
    case.rows("")


def missing_data(case):
    case.rows("")
    (case.folder / "rows.jsonl").unlink()


def wrong_column(case):
    case.rows('{"question": "a", "reply": "b"}\n')


def malformed_line(case):
    case.rows('{"question": "a", "answer": "b"}\n{"question": "c", "answer"\n')


def long_rows_only(case):
    case.rows(json.dumps({"question": "word " * 200, "answer": "b"}) + "\n")


def used_folder(case):
    folder = case.folder / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def wrong_mesh(case):
    case.keys["mesh"] = {"data": 3}


CASES = {
    missing_model: "nowhere: no such folder",
    missing_shard: "model-00002-of-00002.safetensors",
    truncated_weights: "model.safetensors",
    missing_tensor: "model.norm.weight",
    wrong_shape: r"mlp\.\w+_proj\.weight.*(96|104)",
    unknown_architecture: "BloomForCausalLM",
    large_tokenizer: "the tokenizer has token id .* the embedding only 300 rows",
    no_tokenizer: "tokenizer",
    adapter_of_another_base: "adapter",
    adapter_of_another_shape: "adapter",
    missing_adapter: "nowhere: no such folder",
    no_target: r"lora_target_modules: 'query_proj' matches no module. Did you mean .*q_proj",
    empty_data: r"rows\.jsonl",
    missing_data: r"rows\.jsonl",
    wrong_column: r"rows\.jsonl.*answer.*reply",
    malformed_line: r"rows\.jsonl:2",
    long_rows_only: "sequence_len",
    used_folder: r"thesis\.tex",
    wrong_mesh: "mesh: .* needs 3 devices",
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_one_line_and_leaves_no_folder(keys, tmp_path, write_base, spoil):
    case = Case(keys, tmp_path, write_base)
    spoil(case)
    output = tmp_path / "out"
    before = sorted(path.name for path in output.iterdir()) if output.exists() else None
    with pytest.raises(UserError, match=CASES[spoil]) as refusal:
        train(load_config(case.keys), quiet=True)
    assert "\n" not in str(refusal.value)
    after = sorted(path.name for path in output.iterdir()) if output.exists() else None
    assert after == before


def test_the_run_that_the_cases_spoil_is_good(keys, tmp_path, write_base, rows):
    case = Case(keys, tmp_path, write_base)
    case.base()
    case.rows(rows.read_text())
    assert train(load_config(case.keys), quiet=True).steps == 1
    shutil.rmtree(tmp_path / "out")
