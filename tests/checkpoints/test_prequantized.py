"""Models that somebody else quantized: they load, compute and learn as their dequantized twins."""

import json
import logging

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora import lora
from jaxlora.checkpoints.load import QuantSpec, check_weights, load_params, read_model_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.lora import LoraConfig, match
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind
from jaxlora.ops.arrays import QuantizedArray
from jaxlora.ops.quantize import dequantize

FORMATS = {"nf4": "nf4", "int8": "int8", "gptq": "int4", "awq": "int4", "compressed": "int4"}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, write_tiny_llama):
    """Returns ``pair(method, **options) -> (quantized folder, twin)``; they are shared."""
    made = {}

    def get(method, **options):
        key = json.dumps([method, options])
        if key not in made:
            folder = tmp_path_factory.mktemp(method)
            made[key] = foreign.write(folder, method, write_tiny_llama, **options)
        return made[key]

    return get


def load(folder, **options):
    cfg, _ = read_model_config(folder)
    return load_params(folder, cfg, **{"dtype": "float32", **options})


def complaint(folder, **options):
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits_and_gradients(folder):
    """Logits, and the gradients of their random projection by an adapter on every linear layer."""
    cfg, _ = read_model_config(folder)
    params, specs = load_params(folder, cfg, dtype="float32"), describe(cfg)
    modules = {path: spec.modules() for path, spec in specs.items() if spec.kind == "linear"}
    targets = match(modules, LoraConfig(r=2, alpha=4, target_modules="all-linear"), list(modules))
    adapter = lora.init(params, targets, jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)  # b begins as zeros, and a learns nothing
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    def forward(adapter):
        model = bind(Transformer(cfg, remat="full"), lora.apply(params, adapter, targets))
        hidden, _ = model(jnp.asarray(TOKENS), positions, jnp.ones_like(TOKENS))
        return model.logits(hidden)

    logits, back = jax.vjp(jax.jit(forward), adapter)
    noise = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    return logits, back(jnp.asarray(noise))[0]


@pytest.mark.parametrize("method", foreign.METHODS)
def test_every_linear_leaf_is_kept_as_stored_and_equals_its_twin(pair, method):
    quantized, twin = map(flatten, map(load, pair(method)))
    for path, spec in describe(read_model_config(pair(method)[0])[0]).items():
        leaf = quantized[path]
        assert isinstance(leaf, QuantizedArray) == (spec.kind == "linear"), path
        if spec.kind == "linear":
            assert leaf.format == FORMATS[method]
            assert not leaf.packed
            leaf = dequantize(leaf, "float32")
        np.testing.assert_array_equal(leaf, twin[path], err_msg=path)


@pytest.mark.parametrize("method", foreign.METHODS)
def test_logits_and_adapter_gradients_equal_the_dequantized_twin(pair, method):
    (ours, our_gradients), (expected, gradients) = map(logits_and_gradients, pair(method))
    assert 0.3 < float(expected.std()) < 3
    # float32, the same numbers multiplied; XLA may fuse the dequantization into its sums.
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    for path, pair_of in gradients.items():
        for part, gradient in pair_of.items():
            scale = float(jnp.abs(gradient).max())
            assert scale > 0
            np.testing.assert_allclose(our_gradients[path][part], gradient, atol=2e-5 * scale)


@pytest.mark.parametrize("method", ["nf4", "gptq"])
def test_modules_that_were_skipped_stay_plain(pair, method):
    folder, twin = pair(method, skip=["down_proj"])
    leaves, plain = flatten(load(folder)), flatten(load(twin))
    assert isinstance(leaves["layers/mlp/up_proj/kernel"], QuantizedArray)
    path = "layers/mlp/down_proj/kernel"
    np.testing.assert_array_equal(leaves[path], plain[path])


@pytest.mark.parametrize("method", ["nf4", "gptq"])
def test_a_leaf_with_plain_layers_among_quantized_ones_is_plain_and_says_so(pair, method, caplog):
    folder, twin = pair(method, skip=["layers.1.mlp.down_proj"])
    with caplog.at_level(logging.WARNING):
        leaves, plain = flatten(load(folder)), flatten(load(twin))
    path = "layers/mlp/down_proj/kernel"
    np.testing.assert_array_equal(leaves[path], plain[path])
    assert f"{path}: 2 of 3 tensors are quantized" in caplog.text
    assert isinstance(leaves["layers/mlp/up_proj/kernel"], QuantizedArray)


def test_zero_biases_of_the_first_gptq_tools_are_ignored_and_others_are_not(pair, tmp_path):
    folder, _ = pair("gptq")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bias"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({**tensors, name: np.zeros(128, np.float16)}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), load(folder))
    save_file({**tensors, name: np.ones(128, np.float16)}, tmp_path / "model.safetensors")
    assert f"{name} has no place" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("method", "wanted", "accepted"),
    [
        ("nf4", "nf4", True),
        ("gptq", "nf4", True),  # what load_in_4bit: true asks for
        ("gptq", "int4", True),
        ("nf4", "int4", False),
        ("nf4", "int8", False),
        ("int8", "int8", True),
        ("int8", "nf4", False),
    ],
)
def test_a_wish_is_granted_if_it_is_what_the_files_are(pair, method, wanted, accepted):
    folder, _ = pair(method)
    if accepted:
        options = {"quantization": QuantSpec(wanted)}
        jax.tree.map(np.testing.assert_array_equal, load(folder, **options), load(folder))
    else:
        message = complaint(folder, quantization=QuantSpec(wanted))
        assert "config.json: the weights are quantized already" in message
        assert f"contradicts {wanted}" in message


def test_an_adapter_cannot_be_split_off_what_is_quantized(pair):
    message = complaint(pair("awq")[0], split=lambda *args, **kwargs: pytest.fail("split"))
    assert "is quantized already (AWQ" in message


def change(folder, tmp_path, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("method", "part"),
    [("nf4", "weight.absmax"), ("int8", "weight"), ("gptq", "scales"), ("awq", "qzeros")],
)
def test_a_missing_part_is_found_by_the_headers(pair, tmp_path, method, part):
    name = f"model.layers.1.self_attn.v_proj.{part}"
    folder = change(pair(method)[0], tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"{name} is missing beside"):
        check_weights(folder, read_model_config(folder)[0])


def test_a_layer_with_another_group_size_is_named(pair, tmp_path, write_tiny_llama):
    folder, _ = pair("nf4")
    name = "model.layers.1.self_attn.v_proj.weight"

    def lie(tensors):
        tensors[f"{name}.absmax"] = np.ones(len(tensors[f"{name}.absmax"]), np.float32)

    message = complaint(change(folder, tmp_path, lie))
    assert name in message
    assert "double quantization, absmax is float32" in message


def test_layers_quantized_in_unlike_ways_are_refused(pair, tmp_path):
    folder, _ = pair("nf4")
    name = "model.layers.1.self_attn.v_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"

    def single(tensors):  # double quantized elsewhere
        tensors[f"{name}.absmax"] = np.ones(len(tensors[f"{name}.absmax"]), np.float32)
        text = json.loads(tensors[state].tobytes())
        text.pop("nested_offset")
        tensors[state] = np.frombuffer(json.dumps(text).encode(), np.uint8).copy()

    message = complaint(change(folder, tmp_path, single))
    assert f"{name} is quantized with other options" in message


def test_a_quantized_embedding_is_refused(pair, tmp_path):
    folder, _ = pair("gptq")

    def quantize_embedding(tensors):
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"model.embed_tokens.{part}"] = tensors[f"model.layers.0.mlp.up_proj.{part}"]

    message = complaint(change(folder, tmp_path, quantize_embedding))
    assert "model.embed_tokens.weight is quantized" in message
    assert "embedding" in message
