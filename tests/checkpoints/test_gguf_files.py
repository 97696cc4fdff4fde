"""A GGUF file is a base model: its values are gguf-py's, its logits those of the same HF folder."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_writing import gguf_weights, of_folder, permute, write_gguf

from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.gguf_files import gguf_config, llama3_factors, open_weights
from jaxlora.checkpoints.gguf_layout import LAYOUTS
from jaxlora.checkpoints.hub import resolve
from jaxlora.checkpoints.load import QuantSpec, check_weights, load_params, read_model_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.generation.probe import probe_logits
from jaxlora.ops.rope import RopeScaling

gguf = pytest.importorskip("gguf")

# A row of 256 is one block of the K types; 8 heads of 32 on 4.
WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
WIDE |= {"intermediate_size": 512, "num_hidden_layers": 1}
BLOCK_BYTES = {"Q4_K": 144, "Q6_K": 210}


@pytest.fixture
def written(tiny_llama, tmp_path):
    """``written(kind, **changes) -> (HF folder, GGUF file)`` of the same model."""

    def write(kind="F32", *, more=(), tensors=(), **changes):
        folder = tiny_llama(**changes)
        config, weights = of_folder(folder)
        weights = {**gguf_weights(config, weights), **dict(tensors)}
        return folder, write_gguf(tmp_path / "model.gguf", config, weights, kind, more=more)

    return write


def loaded(path, **options):
    cfg, _ = read_model_config(path)
    return cfg, load_params(path, cfg, dtype=jnp.float32, **options)


def assert_same_leaves(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path, values in other.items():
        np.testing.assert_array_equal(one[path], values, err_msg=path)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_float32_file_is_the_model_it_was_made_from(written, tied, bias):
    folder, file = written(tie_word_embeddings=tied, attention_bias=bias, rope_theta=5e5)
    (cfg, params), (expected_cfg, expected) = loaded(file), loaded(folder)
    assert cfg == expected_cfg
    assert_same_leaves(params, expected)
    np.testing.assert_array_equal(probe_logits(cfg, params), probe_logits(cfg, expected))


def test_a_folder_that_holds_the_file_does_as_well(written):
    _, file = written()
    assert_same_leaves(loaded(file.parent)[1], loaded(file)[1])
    assert resolve(file) == file
    assert base_fingerprint(file) == base_fingerprint(file.parent)
    check_weights(file, read_model_config(file)[0])


def test_fingerprint_is_that_of_the_same_model_in_safetensors(written):
    folder, file = written()
    assert base_fingerprint(file) == base_fingerprint(folder)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_values_are_those_gguf_py_dequantizes(tiny_llama, tmp_path, kind):
    config, weights = of_folder(tiny_llama())
    stored = gguf_weights(config, weights)
    file = write_gguf(tmp_path / "model.gguf", config, stored, kind)
    tensors = open_weights(file)
    qtype = gguf.GGMLQuantizationType[kind]
    for name, values in weights.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if values.ndim == 2:
            values = values if heads is None else permute(values, heads)
            values = gguf.quants.dequantize(gguf.quants.quantize(values, qtype), qtype)
            values = values if heads is None else unpermute(values, heads)
        np.testing.assert_array_equal(tensors.read(name).astype(np.float32), values, err_msg=name)
        rows = tensors.read(name, slice(0, 2)).astype(np.float32)
        np.testing.assert_array_equal(rows, values[:2], err_msg=name)
    assert tensors.info["model.norm.weight"].dtype == "F32"
    expected = {"F16": "F16", "BF16": "BF16"}.get(kind, "F32")
    assert tensors.info["lm_head.weight"].dtype == expected


def unpermute(values, heads):
    """`LlamaTensorProcessor._reverse_permute_weights` of transformers."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(2, 1).reshape(values.shape)


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_k_quants_are_those_gguf_py_dequantizes(tiny_llama, tmp_path, kind):
    config, weights = of_folder(tiny_llama(**WIDE))
    stored = gguf_weights(config, weights)
    rng = np.random.default_rng(0)
    raw = {}
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
        rows, columns = stored[name].shape
        blocks = rng.integers(0, 256, (rows, columns // 256, BLOCK_BYTES[kind]), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        # The float16 scales of a block: d and dmin first in Q4_K, d last in Q6_K.
        places = slice(0, 4) if kind == "Q4_K" else slice(-2, None)
        blocks[..., places] = np.tile(scale, 2 if kind == "Q4_K" else 1)
        raw[name] = (kind, blocks.reshape(rows, -1))
    tensors = open_weights(write_gguf(tmp_path / "m.gguf", config, stored, "Q8_0", raw=raw))
    for name, hf_name, heads in (
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", 8),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", None),
    ):
        values = gguf.quants.dequantize(raw[name][1], gguf.GGMLQuantizationType[kind])
        values = values if heads is None else unpermute(values, heads)
        assert np.isfinite(values).all()
        assert values.std() > 0
        np.testing.assert_array_equal(tensors.read(hf_name), values)
    cfg, params = loaded(tmp_path / "m.gguf", quantization=QuantSpec("nf4"))
    assert np.isfinite(probe_logits(cfg, params)).all()


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def test_linear_rope_scaling_is_read(written):
    more = [
        ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
        ("add_rope_scaling_factor", 4.0),
    ]
    folder, file = written(rope_scaling=SCALINGS["linear"], more=more)
    assert read_model_config(file)[0] == read_model_config(folder)[0]


def test_llama3_rope_scaling_is_read_back_from_its_factors(written):
    # 64 channels: fast, slow and blended frequencies.
    factors = llama3_factors(64, 5e5, RopeScaling("llama3", 32.0))
    assert (factors.min(), factors.max()) == (1, 32)
    assert len(set(factors)) > 3
    folder, file = written(
        rope_scaling=SCALINGS["llama3"],
        rope_theta=5e5,
        head_dim=64,
        tensors={"rope_freqs.weight": factors},
    )
    assert read_model_config(file)[0] == read_model_config(folder)[0]
    check_weights(file, read_model_config(file)[0])


def test_factors_of_another_scaling_are_refused(written):
    _, file = written(tensors={"rope_freqs.weight": np.array([1, 2, 3, 7], np.float32)})
    with pytest.raises(UserError, match=r"rope_freqs.weight has factors that are not Llama 3's"):
        read_model_config(file)


REFUSED = {
    "architecture": (
        lambda file: write_gguf(file, {"rms_norm_eps": 1e-5}, {}, architecture="rwkv6"),
        "'rwkv6' models are not read from or written to GGUF; supported: llama, qwen2",
    ),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-5000]), "not a whole GGUF"),
    "no gguf": (lambda file: file.write_bytes(b"nothing of the kind"), "not a whole GGUF"),
    "several": (lambda file: shutil.copy(file, file.with_name("b.gguf")), "several GGUF files"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_read_is_one_line(written, fault):
    spoil, expected = REFUSED[fault]
    _, file = written()
    spoil(file)
    with pytest.raises(UserError, match=expected) as caught:
        loaded(file.parent)
    assert "\n" not in str(caught.value)
    assert str(file.parent) in str(caught.value)


def test_a_tensor_without_a_place_is_named(written):
    _, file = written(tensors={"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 4), np.float32)})
    with pytest.raises(UserError, match=r"blk.0.ffn_gate_exps.weight is no tensor"):
        loaded(file)


def test_a_missing_tensor_is_named(written, tiny_llama, tmp_path):
    config, weights = of_folder(tiny_llama())
    stored = gguf_weights(config, weights)
    del stored["blk.1.attn_k.weight"]
    file = write_gguf(tmp_path / "short.gguf", config, stored)
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.k_proj.weight"):
        loaded(file)


def test_without_the_package_the_extra_is_named(written, monkeypatch):
    _, file = written()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"jaxlora\[gguf\]"):
        gguf_config(file)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.hf)
def test_names_are_those_of_gguf_py(layout):
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.gguf)
    table = gguf.get_tensor_name_map(architecture, 2)
    for ours, theirs in layout.names.items():
        name, hf_name = ours.format(1), theirs.format(1)
        if name == "output" and layout.gguf.startswith("gemma"):
            continue  # always tied; gguf-py lists no head
        assert table.get_name(hf_name) == name
        assert layout.hf_name(f"{name}.weight") == f"{hf_name}.weight"
        assert layout.gguf_name(f"{hf_name}.weight") == f"{name}.weight"
