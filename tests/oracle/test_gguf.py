"""GGUF files beside transformers: the same model in safetensors, and transformers' own reading."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from gguf_writing import byte_level, gguf_weights, write_gguf

from jaxlora.checkpoints.gguf_write import save_gguf
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.generation.probe import probe_logits, probe_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

# float32, 3 layers, logits of standard deviation about 1: order of sums. Measured 5e-6 to 1e-5;
# rows in the wrong order or a norm without its offset cost 0.1 and more.
TOLERANCE = 2e-5
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
SOFTCAPS = [
    ("add_attn_logit_softcapping", 50.0),
    ("add_final_logit_softcapping", 30.0),
    ("add_sliding_window", 8),
]
FAMILIES = {
    "Llama": ("llama", {}, []),
    "Mistral": ("llama", {"head_dim": 32, "sliding_window": None}, []),
    "Qwen2": ("qwen2", {}, []),
    "Qwen3": ("qwen3", {"head_dim": 32}, []),
    "Gemma": ("gemma", GEMMA, []),
    "Gemma2": (
        "gemma2",
        {**GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 32, "attn_implementation": "eager"},
        SOFTCAPS,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_file_has_the_logits_of_transformers(make_pair, tmp_path, name):
    architecture, changes, more = FAMILIES[name]
    pair = make_pair(name, 0, **{**SIZES, **changes})
    config = pair.torch_model.config.to_dict()
    weights = {key: values.numpy() for key, values in pair.torch_model.state_dict().items()}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight")
    stored = gguf_weights(config, weights, architecture)
    config["rope_theta"] = pair.cfg.rope_theta
    file = write_gguf(
        tmp_path / "m.gguf", config, stored, "F32", architecture=architecture, more=more
    )
    cfg, _ = read_model_config(file)
    logits = probe_logits(cfg, load_params(file, cfg, dtype=jnp.float32))
    np.testing.assert_allclose(logits, pair.torch_logits(probe_tokens(cfg)), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_logits_are_those_of_transformers_reading_the_same_file(make_pair, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    pair = make_pair("Llama", 1, **{**SIZES, "head_dim": 16})
    config = pair.torch_model.config.to_dict() | {"rope_theta": pair.cfg.rope_theta}
    weights = {key: values.numpy() for key, values in pair.torch_model.state_dict().items()}
    more = [("add_name", "m"), ("add_vocab_size", 96), ("add_rope_dimension_count", 16)]
    stored = gguf_weights(config, weights)
    file = write_gguf(tmp_path / "m.gguf", config, stored, kind, more=more)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    cfg, _ = read_model_config(file)
    logits = probe_logits(cfg, load_params(file, cfg, dtype=jnp.float32))
    with torch.no_grad():
        expected = reference(torch.from_numpy(probe_tokens(cfg))).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    assert np.abs(expected - pair.torch_logits(probe_tokens(cfg))).max() > TOLERANCE


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_written_file_has_the_tensors_of_llama_cpps_converter(make_pair, tmp_path, name, kind):
    import gguf

    architecture, changes, _ = FAMILIES[name]
    pair = make_pair(name, 2, **{**SIZES, **changes, "vocab_size": 420})
    save_gguf(pair.params, pair.cfg, tmp_path / "m.gguf", kind=kind, tokenizer=byte_level())
    config = pair.torch_model.config.to_dict()
    weights = {key: values.numpy() for key, values in pair.torch_model.state_dict().items()}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight")
    expected = gguf_weights(config, weights, architecture)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert tensors.keys() == expected.keys()
    for key, values in expected.items():
        qtype = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        stored = gguf.quants.quantize(np.ascontiguousarray(values), qtype)
        np.testing.assert_array_equal(tensors[key].data, stored, err_msg=key)
    cfg, _ = read_model_config(tmp_path / "m.gguf")
    logits = probe_logits(cfg, load_params(tmp_path / "m.gguf", cfg, dtype=jnp.float32))
    distance = np.abs(logits - pair.torch_logits(probe_tokens(cfg)))
    # Half a unit of 11 bits (float16) or 8 (a block), through 3 layers; see test_gguf_write.
    assert distance.mean() < {"F16": 0.002, "Q8_0": 0.06}[kind]


def test_transformers_reads_our_file_with_our_logits(make_pair, tmp_path):
    from transformers import AutoModelForCausalLM

    pair = make_pair("Llama", 3, **{**SIZES, "vocab_size": 420, "head_dim": 16})
    save_gguf(pair.params, pair.cfg, tmp_path / "m.gguf", kind="Q8_0", tokenizer=byte_level())
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    cfg, _ = read_model_config(tmp_path / "m.gguf")
    logits = probe_logits(cfg, load_params(tmp_path / "m.gguf", cfg, dtype=jnp.float32))
    with torch.no_grad():
        expected = reference(torch.from_numpy(probe_tokens(cfg))).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
