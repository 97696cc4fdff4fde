import json
import os
import shutil
import subprocess
import sys
import time

import checkpoint_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.load import QuantSpec, check_weights, load_params, read_model_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.models.parameters import describe
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.ops.quantize import dequantize, quantize


@pytest.fixture
def broken(tiny_llama, tmp_path):
    """Returns a copy of the tiny model with its tensors and config changed by a function."""

    def make(change, **options):
        folder = tmp_path / "broken"
        shutil.copytree(tiny_llama(**options), folder)
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def load(folder, **options):
    return load_params(folder, read_model_config(folder)[0], **{"dtype": "float32", **options})


def complaint(folder, **options):
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_leaf_is_its_tensors_stacked_and_transposed(tiny_llama):
    folder = tiny_llama(attention_bias=True, mlp_bias=True)
    tensors = load_file(folder / "model.safetensors")
    leaves = flatten(load(folder))
    specs = describe(read_model_config(folder)[0])
    assert leaves.keys() == specs.keys()
    assert sum(spec.size for spec in specs.values()) == sum(t.size for t in tensors.values())
    np.testing.assert_array_equal(
        leaves["layers/mlp/down_proj/kernel"][2], tensors["model.layers.2.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(
        leaves["layers/attention/k_proj/bias"][1], tensors["model.layers.1.self_attn.k_proj.bias"]
    )
    np.testing.assert_array_equal(leaves["embed/embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(leaves["lm_head/kernel"], tensors["lm_head.weight"].T)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtype_is_converted_on_the_way(tiny_llama, stored, wanted):
    folder = tiny_llama(dtype=stored)
    tensor = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    leaf = flatten(load(folder, dtype=wanted))["layers/attention/q_proj/kernel"]
    assert leaf.dtype == wanted
    np.testing.assert_array_equal(leaf[0], tensor.T.astype(jnp.dtype(wanted)))


@pytest.mark.parametrize("format", ["int4", "nf4", "int8"])
def test_linear_leaves_and_no_others_are_quantized_layer_by_layer(tiny_llama, format):
    folder = tiny_llama(dtype="bfloat16")
    leaves = flatten(load(folder, dtype="bfloat16", quantization=QuantSpec(format, group_size=16)))
    for path, spec in describe(read_model_config(folder)[0]).items():
        assert isinstance(leaves[path], QuantizedArray) == (spec.kind == "linear"), path
    tensors = load_file(folder / "model.safetensors")
    leaf = leaves["layers/mlp/up_proj/kernel"]
    assert leaf.dtype == "bfloat16"
    for layer in range(3):
        weight = tensors[f"model.layers.{layer}.mlp.up_proj.weight"].T
        alone = quantize(weight, format, group_size=16, dtype="bfloat16")
        piece = jax.tree.map(lambda x, layer=layer: x[layer], leaf)
        jax.tree.map(np.testing.assert_array_equal, piece, alone)
        np.testing.assert_array_equal(dequantize(leaf)[layer], dequantize(alone))


def test_place_gets_each_complete_host_leaf_once_and_progress_reaches_the_end(tiny_llama):
    placed, steps = {}, []

    def place(path, leaf):
        assert all(isinstance(part, np.ndarray) for part in jax.tree.leaves(leaf))
        assert path not in placed
        placed[path] = leaf.shape
        return path

    folder = tiny_llama()
    spec = QuantSpec("nf4")
    leaves = flatten(
        load(folder, quantization=spec, place=place, progress=lambda *a: steps.append(a))
    )
    specs = describe(read_model_config(folder)[0])
    assert placed == {path: spec.full_shape for path, spec in specs.items()}
    assert leaves == {path: path for path in specs}
    assert steps[-1][0] == steps[-1][1]
    assert steps == sorted(set(steps))


def test_missing_tensors_are_named_before_anything_is_read(broken):
    def change(tensors, config):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]

    message = complaint(broken(change), place=lambda *a: pytest.fail("read something"))
    assert "model.layers.1.mlp.up_proj.weight, model.norm.weight" in message


def test_leftover_tensors_are_all_reported(broken):
    def change(tensors, config):
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        tensors["extra"] = np.ones(8, np.float32)

    message = complaint(broken(change))
    assert (
        "model.safetensors: extra, model.layers.0.self_attn.q_norm.weight has no place" in message
    )


def test_inert_rotary_buffers_are_ignored(broken, tiny_llama):
    def change(tensors, config):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    ours, plain = load(broken(change)), load(tiny_llama())
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_wrong_shape_names_tensor_file_expected_and_found(broken):
    message = complaint(broken(lambda tensors, config: config.update(intermediate_size=80)))
    assert "model.safetensors: model.layers.0.mlp.down_proj.weight has shape [32, 64]" in message
    assert "expected [32, 80]" in message


def test_integer_weights_are_refused(broken):
    def change(tensors, config):
        tensors["model.norm.weight"] = np.ones(32, np.int8)

    assert "model.norm.weight has dtype I8" in complaint(broken(change))


def test_nan_is_refused_by_quantization_with_its_tensor_named(broken):
    def change(tensors, config):
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = np.nan

    folder = broken(change)
    message = complaint(folder, quantization=QuantSpec("int4"))
    assert "model.safetensors: model.layers.1.self_attn.o_proj.weight: non-finite" in message


@pytest.mark.parametrize("kept", ["embedding", "head", "both"])
def test_tied_weights_load_from_embedding_head_or_both(broken, tiny_llama, kept):
    def change(tensors, config):
        if kept != "embedding":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        if kept == "head":
            del tensors["model.embed_tokens.weight"]

    ours = load(broken(change, tie_word_embeddings=True))
    assert "lm_head" not in ours
    jax.tree.map(np.testing.assert_array_equal, ours, load(tiny_llama(tie_word_embeddings=True)))


def test_tied_weights_that_differ_are_refused(broken):
    def change(tensors, config):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][96, 5] += 1

    message = complaint(broken(change, tie_word_embeddings=True))
    assert "lm_head.weight differs from model.embed_tokens.weight" in message


def test_untied_model_without_head_hints_at_tying(broken):
    message = complaint(broken(lambda tensors, config: tensors.pop("lm_head.weight")))
    assert "asks for lm_head.weight" in message
    assert "tie_word_embeddings: true" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "config.json: not found"),
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: expected a JSON object, found list"),
        (
            '{"quantization_config": {"quant_method": "gptq"}}',
            r"/config\.json: .*bits None",
        ),
        ('{"architectures": ["MambaForCausalLM"]}', "/config.json: architecture MambaForCausalLM"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": "x"}', "wrong kind"),
    ],
)
def test_bad_config_is_one_line_with_the_path(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        read_model_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


MEASURE = """
import resource, sys
from pathlib import Path
import jax
from jaxlora.checkpoints.load import QuantSpec, load_params, read_model_config
from jaxlora.ops.quantize import quantize
import numpy as np

def peak():  # resident bytes, mapped file pages included
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) * 1024

folder = Path(sys.argv[1])
cfg, _ = read_model_config(folder)
quantize(np.ones((64, 64), np.float32), "nf4")
jax.numpy.zeros(3)
before = peak()
kept = load_params(folder, cfg, dtype="bfloat16", quantization=QuantSpec(sys.argv[2]))
bits = lambda x: 4 if x.dtype == jax.numpy.int4 else 8 * x.dtype.itemsize
held = sum(x.size * bits(x) // 8 for x in jax.tree.leaves(kept))
print(peak() - before, held)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_peak_host_memory_is_the_quantized_model_and_two_tensors(
    tmp_path, write_tiny_llama, format
):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 128, "vocab_size": 512}
    folder = write_tiny_llama(tmp_path, dtype="bfloat16", num_hidden_layers=10, **sizes)
    # glibc's per-thread arenas keep freed memory, 25 MB of noise here; these switch that off.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), format],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **allocator},
    )
    growth, held = map(int, result.stdout.split())
    stored = (folder / "model.safetensors").stat().st_size
    tensor = 512 * 1536 * 2
    assert stored > 60e6
    # Two tensors; 26 MB for float32 pieces, threads and the compiler (20 measured). The file kept
    # open or read whole would add 64 MB, a byte for each int4 value 32 MB.
    assert growth < held + 2 * tensor + 26e6, (growth, held, stored)


def test_a_lying_70b_checkpoint_is_refused_before_anything_is_allocated(tmp_path):
    config, name = checkpoint_files.LLAMA_70B, "model.layers.79.mlp.down_proj.weight"
    whole = checkpoint_files.shapes(config)
    cases = {
        "is not in this shard, though the index says so": {
            key: shape for key, shape in whole.items() if key != name
        },
        "has shape [8192, 28671]; expected [8192, 28672]": {**whole, name: (8192, 28671)},
        "lm_head.weight has shape": {**whole, "lm_head.weight": (128256, 8191)},
    }
    for number, (message, stored) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint_files.write_headers(folder, config, stored=stored)
        started = time.monotonic()
        assert message in complaint(folder, place=lambda *a: pytest.fail("read something"))
        assert time.monotonic() - started < 2  # 0.03 s measured on a busy machine
    (folder / "model-00007-of-00030.safetensors").unlink()
    assert "00007-of-00030.safetensors: shard is missing" in complaint(folder)


def test_a_70b_checkpoint_of_headers_has_what_its_config_asks_for(tmp_path):
    checkpoint_files.write_headers(tmp_path, checkpoint_files.LLAMA_70B)
    check_weights(tmp_path, read_model_config(tmp_path)[0])
