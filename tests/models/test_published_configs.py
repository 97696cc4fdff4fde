"""config.json as well-known repositories publish it, in `configs/`, is read with its numbers.

What the arithmetic depends on is theirs; versions and the like may be those of another revision.
"""

import json
from pathlib import Path

import pytest

from jaxlora.models.families.read import read_config

FOLDER = Path(__file__).parent / "configs"
# vocab, embed, mlp, layers, heads, kv heads, head_dim, context, eps, theta, window, tied
NUMBERS = {
    "DeepSeek-V2-Lite": (102400, 2048, 10944, 27, 16, 16, 192, 163840, 1e-6, 1e4, None, False),
    "DeepSeek-V3": (129280, 7168, 18432, 61, 128, 128, 192, 163840, 1e-6, 1e4, None, False),
    "GLM-4-9B-0414": (151552, 4096, 13696, 40, 32, 2, 128, 32768, 1e-5, 1e4, None, False),
    "Mistral-7B-v0.1": (32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 1e4, 4096, False),
    "Mistral-Nemo-Base-2407": (131072, 5120, 14336, 40, 32, 8, 128, 128000, 1e-5, 1e6, None, False),
    "Mixtral-8x7B-v0.1": (32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 1e6, None, False),
    "ModernBERT-base": (50368, 768, 1152, 22, 12, 12, 64, 8192, 1e-5, 1.6e5, 65, True),
    "OLMo-2-1124-7B": (100352, 4096, 11008, 32, 32, 32, 128, 4096, 1e-6, 5e5, None, False),
    "Phi-3-mini-128k-instruct": (
        *(32064, 3072, 8192, 32, 32, 32, 96, 131072),
        *(1e-5, 1e4, 262144, False),
    ),
    "Phi-3-mini-4k-instruct": (32064, 3072, 8192, 32, 32, 32, 96, 4096, 1e-5, 1e4, 2047, False),
    "Phi-3.5-mini-instruct": (
        *(32064, 3072, 8192, 32, 32, 32, 96, 131072),
        *(1e-5, 1e4, 262144, False),
    ),
    "Phi-4-mini-instruct": (
        *(200064, 3072, 8192, 32, 24, 8, 128, 131072),
        *(1e-5, 1e4, 262144, True),
    ),
    "Qwen1.5-MoE-A2.7B": (151936, 2048, 5632, 24, 16, 16, 128, 8192, 1e-6, 1e6, None, False),
    "Qwen2.5-7B": (152064, 3584, 18944, 28, 28, 4, 128, 131072, 1e-6, 1e6, None, False),
    "Qwen3-30B-A3B": (151936, 2048, 6144, 48, 32, 4, 128, 40960, 1e-6, 1e6, None, False),
    "Qwen3-8B": (151936, 4096, 12288, 36, 32, 8, 128, 40960, 1e-6, 1e6, None, False),
    "SmolLM2-1.7B": (49152, 2048, 8192, 24, 32, 32, 64, 8192, 1e-5, 1.3e5, None, True),
    "SmolLM3-3B": (128256, 2048, 11008, 36, 16, 4, 128, 65536, 1e-6, 5e6, None, True),
    "bert-base-uncased": (30522, 768, 3072, 12, 12, 12, 64, 512, 1e-12, 1e4, None, True),
    "c4ai-command-r-v01": (256000, 8192, 22528, 40, 64, 64, 128, 8192, 1e-5, 8e6, None, True),
    "c4ai-command-r7b-12-2024": (256000, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e4, 4096, True),
    "falcon-40b": (65024, 8192, 32768, 60, 128, 8, 64, 2048, 1e-5, 1e4, None, True),
    "falcon-7b": (65024, 4544, 18176, 32, 71, 1, 64, 2048, 1e-5, 1e4, None, True),
    "gemma-2-2b": (256000, 2304, 9216, 26, 8, 4, 256, 8192, 1e-6, 1e4, 4096, True),
    "gemma-3-1b-it": (262144, 1152, 6912, 26, 4, 1, 256, 32768, 1e-6, 1e6, 512, True),
    "gemma-7b": (256000, 3072, 24576, 28, 16, 16, 256, 8192, 1e-6, 1e4, None, True),
    "glm-4-9b-hf": (151552, 4096, 13696, 40, 32, 2, 128, 8192, 1.5625e-7, 1e4, None, False),
    "gpt-neox-20b": (50432, 6144, 24576, 44, 64, 64, 96, 2048, 1e-5, 1e4, None, False),
    "gpt-oss-20b": (201088, 2880, 2880, 24, 64, 8, 64, 131072, 1e-5, 1.5e5, 128, False),
    "gpt2": (50257, 768, 3072, 12, 12, 12, 64, 1024, 1e-5, 1e4, None, True),
    "granite-3.3-8b-instruct": (49159, 4096, 12800, 40, 32, 8, 128, 131072, 1e-5, 1e7, None, True),
    "helium-1-preview-2b": (48000, 2560, 7040, 24, 20, 20, 128, 4096, 1e-8, 1e5, None, False),
    "phi-2": (51200, 2560, 10240, 32, 32, 32, 80, 2048, 1e-5, 1e4, None, False),
    "phi-4": (100352, 5120, 17920, 40, 40, 10, 128, 16384, 1e-5, 2.5e5, None, False),
    "pythia-160m": (50304, 768, 3072, 12, 12, 12, 64, 2048, 1e-5, 1e4, None, False),
    "roberta-base": (50265, 768, 3072, 12, 12, 12, 64, 512, 1e-5, 1e4, None, True),
    "stablelm-2-1_6b": (100352, 2048, 5632, 24, 32, 32, 64, 4096, 1e-5, 1e4, None, False),
    "stablelm-zephyr-3b": (50304, 2560, 6912, 32, 32, 32, 80, 4096, 1e-5, 1e4, None, False),
    "starcoder2-3b": (
        *(49152, 3072, 12288, 30, 24, 2, 128, 16384),
        *(1e-5, 999999.4420358813, 4096, True),
    ),
}
# Experts, and how many of them a token goes to.
EXPERTS = {
    "DeepSeek-V2-Lite": (64, 6),
    "Qwen1.5-MoE-A2.7B": (60, 4),
    "DeepSeek-V3": (256, 8),
    "Mixtral-8x7B-v0.1": (8, 2),
    "Qwen3-30B-A3B": (128, 8),
    "gpt-oss-20b": (32, 4),
}
# Channels of a head that are turned, where not all.
ROTARY = {
    **{"DeepSeek-V3": 64, "glm-4-9b-hf": 64, "phi-2": 32, "pythia-160m": 16, "stablelm-2-1_6b": 16},
    **{"DeepSeek-V2-Lite": 64, "GLM-4-9B-0414": 64, "gpt-neox-20b": 24, "stablelm-zephyr-3b": 20},
    "Phi-4-mini-instruct": 96,
    **dict.fromkeys(("gpt2", "bert-base-uncased", "roberta-base"), 0),
}


def read(name):
    return read_config(json.loads((FOLDER / f"{name}.json").read_text()))


def test_every_file_has_its_numbers():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_published_configs_give_their_numbers(name):
    cfg = read(name)
    assert NUMBERS[name] == (
        *(cfg.vocab_size, cfg.embed_dim, cfg.mlp_dim, cfg.num_layers),
        *(cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.max_context),
        *(cfg.norm_eps, cfg.rope_theta, cfg.sliding_window, cfg.tie_embedding),
    )
    moe = cfg.moe and (cfg.moe.num_experts, cfg.moe.routing.top_k)
    assert moe == EXPERTS.get(name)
    assert cfg.rotary_dim == ROTARY.get(name)


def test_published_patterns_of_layers():
    gemma = read("gemma-3-1b-it")
    assert [layer for layer in range(26) if layer not in gemma.sliding_layers] == [5, 11, 17, 23]
    assert gemma.local_rope_theta == 1e4
    assert read("SmolLM3-3B").nope_layers == tuple(range(3, 36, 4))
    assert read("c4ai-command-r7b-12-2024").nope_layers == tuple(range(3, 32, 4))
    assert read("gpt-oss-20b").sliding_layers == tuple(range(0, 24, 2))
    assert read("DeepSeek-V3").moe.layers == tuple(range(3, 61))


@pytest.mark.parametrize("name", ["Phi-3-mini-128k-instruct", "Phi-3.5-mini-instruct"])
def test_published_factors_of_a_long_context(name):
    """One file calls it su, the other longrope; 128 thousand tokens of 4 thousand."""
    scaling = read(name).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("longrope", 32.0, 4096)
    assert scaling.attention_factor == pytest.approx(
        1.190238, abs=1e-6
    )  # sqrt(1 + ln 32 / ln 4096)
    assert (len(scaling.short_factor), len(scaling.long_factor)) == (48, 48)
    assert scaling.long_factor[-1] > 64 > scaling.short_factor[-1]
