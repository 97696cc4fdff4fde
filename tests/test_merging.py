"""A merged folder is a model like any other, with the logits of base + adapter."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import SIZES, tiny_run

from jaxlora import lora
from jaxlora.checkpoints.load import QuantSpec, load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter
from jaxlora.core.errors import UserError
from jaxlora.generation.probe import probe_logits
from jaxlora.merging import merge, merge_differences
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind
from jaxlora.training.export import export

INT4 = QuantSpec("int4")
# float32 on both sides, logits of standard deviation about 1: rounding of the sums alone.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_tiny_llama):
    return tiny_run(tmp_path_factory, write_tiny_llama)


def adapted(folder, adapter=None, quantization=None):
    """Config and weights of a model folder, an adapter applied beside them if given."""
    cfg, _ = read_model_config(folder)
    params = load_params(folder, cfg, dtype=jnp.float32, quantization=quantization)
    if adapter is not None:
        arrays, targets, _ = load_adapter(adapter, describe(cfg))
        params = lora.apply(params, arrays, targets)
    return cfg, params


def probe(folder, **options):
    return probe_logits(*adapted(folder, **options))


def logits(folder, adapter=None, quantization=None):
    cfg, params = adapted(folder, adapter, quantization)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 12))
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    model = bind(Transformer(cfg), params)
    hidden, _ = model(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
    return np.asarray(model.logits(hidden))


def distance(one, other):
    return np.abs(one - other).max()


@pytest.mark.parametrize("quantization", [None, INT4], ids=["plain", "int4"])
def test_merged_logits_are_those_of_base_and_adapter(quantization, run, tmp_path):
    folder = merge(run.folder, None, tmp_path / "merged", quantization=quantization)
    expected = logits(run.base, run.folder, quantization)
    assert distance(logits(folder), expected) < ROUNDING
    assert distance(logits(run.base), expected) > 1000 * ROUNDING, "the adapter does something"


def test_quantization_simulates_the_base(run, tmp_path):
    plain = merge(run.folder, None, tmp_path / "plain")
    simulated = merge(run.folder, None, tmp_path / "simulated", quantization=INT4)
    assert distance(logits(plain), logits(simulated)) > 1000 * ROUNDING
    tensors = load_file(simulated / "model.safetensors")
    assert {str(values.dtype) for values in tensors.values()} == {"float32"}


def test_trained_is_the_storage_that_the_adapter_records(run, tmp_path):
    named = merge(run.folder, None, tmp_path / "named", quantization=INT4)
    recorded = merge(run.folder, None, tmp_path / "recorded", quantization="trained")
    one, other = (load_file(folder / "model.safetensors") for folder in (named, recorded))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def without_record(run, folder):
    """The adapter as PEFT would save it again: the same tensors, no word of ours."""
    folder.mkdir()
    shutil.copy(run.folder / "adapter_config.json", folder)
    save_file(
        load_file(run.folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors"
    )
    return folder


def test_trained_storage_that_nobody_recorded_is_refused(run, tmp_path):
    adapter = without_record(run, tmp_path / "adapter")
    with pytest.raises(UserError, match="--quantization"):
        merge(run.base, adapter, tmp_path / "merged", quantization="trained")
    assert not (tmp_path / "merged").exists()
    assert merge_differences(run.base, adapter) is None, "nothing to compare with"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_differences_are_those_of_the_written_models(run, tmp_path, dtype):
    measured = merge_differences(run.folder, dtype=dtype)
    assert measured.storage.format == INT4.format
    trained = probe(run.base, adapter=run.folder, quantization=INT4)
    assert measured.logit_std == pytest.approx(trained.std())
    for quantization, difference in ((None, measured.plain), (INT4, measured.simulated)):
        folder = tmp_path / str(quantization)
        merge(run.folder, None, folder, quantization=quantization, dtype=dtype)
        distances = np.abs(probe(folder) - trained)
        # Both round the same sums; only the order of float32 sums in the forward pass may differ.
        assert difference.largest == pytest.approx(distances.max(), rel=0.1, abs=ROUNDING)
        assert difference.mean == pytest.approx(distances.mean(), rel=0.1, abs=ROUNDING)
    assert measured.plain.largest > 10 * measured.simulated.largest


def test_base_and_adapter_may_be_named_apart(run, tmp_path):
    alone = merge(run.folder, None, tmp_path / "alone")
    apart = merge(run.base, run.folder, tmp_path / "apart")
    one, other = (load_file(folder / "model.safetensors") for folder in (alone, apart))
    assert one.keys() == other.keys() == load_file(run.base / "model.safetensors").keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_merged_folder_has_config_and_tokenizer_but_no_adapter(run, tmp_path):
    folder = merge(run.folder, None, tmp_path / "merged")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.startswith("adapter")]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_dtype_is_that_of_the_files(run, tmp_path):
    folder = merge(run.folder, None, tmp_path / "merged", dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    assert {str(values.dtype) for values in tensors.values()} == {"bfloat16"}


def test_merging_what_is_no_adapter_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        merge(run.base, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_a_model_as_adapter_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        merge(run.base, run.base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_output_folder_that_holds_a_model_is_refused(run, tmp_path):
    folder = merge(run.folder, None, tmp_path / "merged")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="merged"):
        merge(run.folder, None, folder, dtype="bfloat16")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_is_not_finite_is_neither_merged_nor_exported(run, tmp_path, value):
    folder = shutil.copytree(run.folder, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].flat[3] = value
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for write in (
        lambda: merge(folder, None, tmp_path / "written"),
        lambda: export_from(folder, tmp_path),
    ):
        with pytest.raises(UserError, match="not finite") as refusal:
            write()
        assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "alone"]


def export_from(folder, tmp_path):
    """Exports the adapter as one that is not a run's."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(folder / name, alone)
    export(alone, tmp_path / "written")
