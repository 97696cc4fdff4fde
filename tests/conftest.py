"""Fixtures for every test: tiny Hugging Face model folders, written without torch."""

import json
import math
import os
from pathlib import Path

# Before JAX comes: commands that tests start must not write to the user's cache of programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture(autouse=True, scope="module")
def _no_old_programs():
    """A process that holds some thousand compiled programs runs out of memory maps and crashes."""
    yield
    jax.clear_caches()


TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a LLaMA or Mistral, spelt out independently of jaxlora."""
    width, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q": (queries, width), "k": (keys, width), "v": (keys, width)}
    attention = {f"self_attn.{name}_proj": shape for name, shape in attention.items()}
    attention["self_attn.o_proj"] = (width, queries)
    mlp = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    mlp = {f"mlp.{name}_proj": shape for name, shape in mlp.items()}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (width,)
        for group, key in ((attention, "attention_bias"), (mlp, "mlp_bias")):
            for name, shape in group.items():
                shapes[f"{prefix}{name}.weight"] = shape
                if config.get(key):
                    shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def scaled_weights(config: dict, seed: int, dtype: str) -> dict[str, np.ndarray]:
    """Random weights with logits of standard deviation about 1.

    At Hugging Face's default init attention is uniform, and a test of logits is blind to most of
    the model.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in hf_shapes(config).items():
        noise = rng.standard_normal(shape)
        if len(shape) == 2:
            weight = noise / math.sqrt(shape[1])
        else:
            weight = (1.0 if "norm" in name else 0.0) + 0.1 * noise
        weights[name] = weight.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return weights


def write_tiny_llama(folder: Path, *, seed: int = 0, dtype: str = "float32", **changes) -> Path:
    """Writes a tiny LLaMA (or, by `changes` to config.json, a Mistral) in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY_CONFIG, "torch_dtype": dtype, **changes}
    if config["architectures"] == ["MistralForCausalLM"]:
        config = {key: config[key] for key in config if key not in ("attention_bias", "mlp_bias")}
        config["model_type"] = "mistral"
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = scaled_weights(config, seed, dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Returns ``tiny_llama(**options) -> Path``, see `write_tiny_llama`; folders are shared, so
    a test that changes one must write its own."""
    folders: dict[str, Path] = {}

    def get(**options) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in folders:
            folders[key] = write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), **options)
        return folders[key]

    return get


@pytest.fixture(scope="session", name="write_tiny_llama")
def write_tiny_llama_fixture():
    """Returns `write_tiny_llama`, for folders of a test's own."""
    return write_tiny_llama
