"""Adapters of mlx-lm and torchtune, written by hand in the published layouts, are the same adapter.

Each is made from a known PEFT adapter by what the other project documents or does in code
(`jaxlora.checkpoints.mlx` and `torchtune` say where), so that every number must come back.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.adapter_files import open_adapter
from jaxlora.checkpoints.load import read_model_config
from jaxlora.checkpoints.peft import load_adapter, save_adapter
from jaxlora.checkpoints.peft_records import trained_storage
from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig, match
from jaxlora.models.parameters import describe

PREFIX = "base_model.model."
HEAD_DIM = 8


@pytest.fixture(scope="module")
def base(tiny_llama):
    folder = tiny_llama()
    cfg, _ = read_model_config(folder)
    assert cfg.head_dim == HEAD_DIM
    return folder, describe(cfg)


def write_peft(base, folder, **options):
    """A random PEFT adapter of the last two layers."""
    config = LoraConfig(r=4, alpha=10, layers_to_transform=(1, 2), **options)
    specs = base[1]
    modules = {path: spec.modules() for path, spec in specs.items() if spec.kind == "linear"}
    stacked = [path for path, spec in specs.items() if spec.layers is not None]
    targets = match(modules, config, stacked)
    rng = np.random.default_rng(0)
    adapter = {}
    for path, target in targets.items():
        *lead, in_dim, out_dim = specs[path].full_shape
        used = np.array(target.ranks, bool).reshape(*lead, 1, 1)
        adapter[path] = {
            "a": rng.standard_normal((*lead, in_dim, 4)).astype(np.float32) * used,
            "b": rng.standard_normal((*lead, 4, out_dim)).astype(np.float32) * used,
        }
        if config.use_dora:
            magnitude = rng.uniform(1, 2, (*lead, out_dim)) * used[..., 0]
            adapter[path]["magnitude"] = magnitude.astype(np.float32)
    save_adapter(folder, adapter, targets, config, base_name="some/base")
    return folder


def write_mlx(peft, folder, parameters, **changes):
    """The same numbers as mlx-lm saves them: transposed, by its names."""
    tensors = {}
    for name, values in load_file(peft / "adapter_model.safetensors").items():
        module = name.removeprefix(PREFIX)
        for suffix, part in ((".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b")):
            if module.endswith(suffix):
                tensors[module.removesuffix(suffix) + part] = np.ascontiguousarray(values.T)
        if module.endswith(".lora_magnitude_vector"):
            tensors[module.removesuffix(".lora_magnitude_vector") + ".m"] = values
    dora = any(name.endswith(".m") for name in tensors)
    content = {
        "adapter_path": "adapters",
        "batch_size": 4,
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": parameters,
        "model": "some/base",
        "num_layers": 2,
        "optimizer": "adam",
        **changes,
    }
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=4))
    return folder


TUNE_NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}


def halves_to_interleaved(values):
    """torchtune's `_permute` of `hf_to_tune`, which is also Meta's order of rows."""
    return (
        values.reshape(-1, 2, HEAD_DIM // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def write_torchtune(peft, folder, name="adapter_0.safetensors"):
    """The same numbers as torchtune names and orders them."""
    tensors = {}
    for key, values in load_file(peft / "adapter_model.safetensors").items():
        for theirs, tune in TUNE_NAMES.items():
            key = key.replace(theirs, tune)
        key = key.removeprefix(PREFIX + "model.")
        key = key.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        key = key.replace("lora_magnitude_vector", "magnitude")
        rotated = ".q_proj." in key or ".k_proj." in key
        if rotated and "lora_a" not in key:
            values = halves_to_interleaved(values)
        tensors[key] = np.ascontiguousarray(values)
    folder.mkdir()
    save_file(tensors, folder / name, metadata={"format": "pt"})
    content = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "w1"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def assert_same(base, folder, peft):
    one, one_targets, one_config = load_adapter(folder, base[1], head_dim=HEAD_DIM)
    other, other_targets, other_config = load_adapter(peft, base[1])
    assert one.keys() == other.keys()
    for path, pair in other.items():
        assert one[path].keys() == pair.keys(), path
        for part, values in pair.items():
            np.testing.assert_array_equal(one[path][part], values, err_msg=f"{path} {part}")
        assert one_targets[path].ranks == other_targets[path].ranks
        assert one_targets[path].scales == pytest.approx(other_targets[path].scales, rel=1e-12)
        assert one_targets[path].dora == other_targets[path].dora
    assert one_config.dropout == other_config.dropout


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_mlx_adapter_is_the_peft_adapter_it_was_made_from(base, tmp_path, dora):
    peft = write_peft(base, tmp_path / "peft", use_dora=dora)
    mlx = write_mlx(peft, tmp_path / "mlx", {"rank": 4, "dropout": 0.0, "scale": 2.5})
    assert_same(base, mlx, peft)


def test_mlx_alpha_of_older_releases_multiplies_the_scale(base, tmp_path):
    peft = write_peft(base, tmp_path / "peft", target_modules=("q_proj", "v_proj"))
    parameters = {"rank": 4, "alpha": 8, "dropout": 0.0, "scale": 1.25}  # 1.25 * 8 / 4 = 10 / 4
    mlx = write_mlx(peft, tmp_path / "mlx", parameters, num_layers=None, lora_layers=2)
    assert_same(base, mlx, peft)


def test_mlx_layers_must_be_the_last_of_the_model(base, tmp_path):
    peft = write_peft(base, tmp_path / "peft")
    parameters = {"rank": 4, "dropout": 0.0, "scale": 2.5}
    for number, count in enumerate((1, -1, 0)):
        mlx = write_mlx(peft, tmp_path / f"mlx{number}", parameters, num_layers=count)
        with pytest.raises(UserError, match=r"num_layers: .* has layers 1 to 2") as caught:
            load_adapter(mlx, base[1])
        assert "\n" not in str(caught.value)


def test_mlx_layers_counted_from_the_start_are_refused(base, tmp_path):
    peft = write_peft(base, tmp_path / "peft")
    mlx = write_mlx(peft, tmp_path / "mlx", {"rank": 4, "dropout": 0.0, "scale": 2.5})
    file = mlx / "adapters.safetensors"
    tensors = {name.replace("s.2.", "s.0."): values for name, values in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(UserError, match="last 2 of this base model's 3 layers"):
        load_adapter(mlx, base[1])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fine_tune_type": "full"}, "'full' is no adapter"),
        ({"lora_parameters": {"rank": 4}}, "scale is missing"),
        ({"lora_parameters": {"rank": 4, "scale": "big"}}, "wrong kind"),
        (
            {"lora_parameters": {"rank": 8, "scale": 2.5}},
            r"has shape \[4, 32\]; expected \[8, 32\]",
        ),
    ],
)
def test_mlx_options_that_do_not_fit_are_one_line(base, tmp_path, changes, expected):
    peft = write_peft(base, tmp_path / "peft", target_modules=("q_proj",))
    mlx = write_mlx(peft, tmp_path / "mlx", {"rank": 4, "dropout": 0.0, "scale": 2.5}, **changes)
    with pytest.raises(UserError, match=expected) as caught:
        load_adapter(mlx, base[1])
    assert "\n" not in str(caught.value)
    assert str(mlx) in str(caught.value)


def test_mlx_embedding_adapter_is_refused_by_name(base, tmp_path):
    peft = write_peft(base, tmp_path / "peft", target_modules=("q_proj",))
    mlx = write_mlx(peft, tmp_path / "mlx", {"rank": 4, "dropout": 0.0, "scale": 2.5})
    file = mlx / "adapters.safetensors"
    extra = {"model.embed_tokens.lora_a": np.zeros((97, 4), np.float32)}
    save_file({**load_file(file), **extra}, file)
    with pytest.raises(UserError, match=r"model.embed_tokens.lora_a is no part of a linear layer"):
        load_adapter(mlx, base[1])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_torchtune_adapter_is_the_peft_adapter_it_was_made_from(base, tmp_path, dora):
    peft = write_peft(base, tmp_path / "peft", use_dora=dora)
    assert_same(base, write_torchtune(peft, tmp_path / "tune"), peft)


def test_torchtune_adapter_in_peft_names_loads_whatever_its_number(base, tmp_path):
    peft = write_peft(base, tmp_path / "peft", target_modules=("q_proj", "v_proj"))
    tune = tmp_path / "tune"
    tune.mkdir()
    shutil.copy(peft / "adapter_model.safetensors", tune / "adapter_10.safetensors")
    save_file({"stale": np.zeros(1, np.float32)}, tune / "adapter_9.safetensors")
    content = json.loads((peft / "adapter_config.json").read_text())
    # What torchtune's recipes write.
    kept = ("r", "lora_alpha", "target_modules", "peft_type")
    (tune / "adapter_config.json").write_text(json.dumps({key: content[key] for key in kept}))
    assert_same(base, tune, peft)


def test_torchtune_pickle_is_refused_with_what_to_do(base, tmp_path):
    (tmp_path / "adapter_0.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    with pytest.raises(UserError, match=r"adapter_0.pt: is a pickle.*save_file") as caught:
        load_adapter(tmp_path, base[1])
    assert "\n" not in str(caught.value)


def test_torchtune_rows_of_other_models_are_not_guessed_at(tiny_llama, base, tmp_path):
    tune = write_torchtune(write_peft(base, tmp_path / "peft"), tmp_path / "tune")
    cfg, _ = read_model_config(tiny_llama(attention_bias=True))
    with pytest.raises(UserError, match="LLaMA, Mistral and Gemma"):
        load_adapter(tune, describe(cfg), head_dim=cfg.head_dim)


def test_torchtune_tensor_of_no_known_name_is_refused(base, tmp_path):
    tune = write_torchtune(write_peft(base, tmp_path / "peft"), tmp_path / "tune")
    file = tune / "adapter_0.safetensors"
    save_file({**load_file(file), "layers.0.attn.q_proj.weight": np.ones((2, 2))}, file)
    with pytest.raises(UserError, match=r"layers.0.attn.q_proj.weight is none of torchtune's"):
        load_adapter(tune, base[1], head_dim=HEAD_DIM)


def test_who_made_a_folder_and_on_what_is_told(base, tmp_path):
    peft = write_peft(base, tmp_path / "peft")
    mlx = write_mlx(peft, tmp_path / "mlx", {"rank": 4, "dropout": 0.1, "scale": 2.5})
    tune = write_torchtune(peft, tmp_path / "tune")
    made_by = {folder: open_adapter(folder).made_by for folder in (peft, mlx, tune)}
    assert made_by == {peft: "PEFT", mlx: "MLX", tune: "torchtune"}
    assert open_adapter(mlx).base_name == open_adapter(peft).base_name == "some/base"
    assert open_adapter(tune).base_name is None
    assert open_adapter(mlx).config.dropout == 0.1
    assert [trained_storage(folder) for folder in (peft, mlx, tune)] == [None] * 3
