import dataclasses
import re

import pytest

from jaxlora.core.errors import UserError
from jaxlora.models.families import FAMILIES
from jaxlora.models.families.read import read_config
from jaxlora.ops.rope import RopeScaling

TINY = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_7B_V03 = MISTRAL_7B_V01 | {
    "attention_dropout": 0.0,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "transformers_version": "4.42.0.dev0",
    "vocab_size": 32768,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
# vocab, embed, mlp, layers, heads, kv heads, head_dim, context, eps, theta, window, tied
NUMBERS = {
    "llama-7b": (LLAMA_7B, (32000, 4096, 11008, 32, 32, 32, 128, 2048, 1e-6, 1e4, None, False)),
    "Llama-2-7b": (
        LLAMA_2_7B,
        (32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5, 1e4, None, False),
    ),
    "Llama-3.1-8B": (
        LLAMA_3_1_8B,
        (128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 5e5, None, False),
    ),
    "Llama-3.2-1B": (
        LLAMA_3_2_1B,
        (128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 5e5, None, True),
    ),
    "Mistral-7B-v0.1": (
        MISTRAL_7B_V01,
        (32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 1e4, 4096, False),
    ),
    "Mistral-7B-v0.3": (
        MISTRAL_7B_V03,
        (32768, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 1e6, None, False),
    ),
    "SmolLM2-135M": (
        SMOLLM2_135M,
        (49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e5, None, True),
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_published_configs_give_their_numbers(name):
    content, numbers = NUMBERS[name]
    cfg = read_config(content)
    read = (
        *(cfg.vocab_size, cfg.embed_dim, cfg.mlp_dim, cfg.num_layers),
        *(cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.max_context),
        *(cfg.norm_eps, cfg.rope_theta, cfg.sliding_window, cfg.tie_embedding),
    )
    assert read == numbers
    assert (cfg.qkv_bias, cfg.output_bias, cfg.mlp_bias) == (False, False, False)


def test_published_llama3_scalings():
    assert read_config(LLAMA_3_1_8B).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert read_config(LLAMA_3_2_1B).rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert read_config(LLAMA_2_7B).rope_scaling is None


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_those_of_transformers(architecture):
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, architecture).config_class
    written = config_class().to_dict() | {"architectures": [architecture]}
    assert read_config({"architectures": [architecture]}) == read_config(written)


def test_unknown_field_is_refused_by_name_with_a_suggestion():
    with pytest.raises(UserError, match=r"sliding_windows: 5 .* Did you mean \"sliding_window\"\?"):
        read_config(MISTRAL_7B_V01 | {"sliding_windows": 5})
    with pytest.raises(UserError, match=r"config\.json: qk_norm: True"):
        read_config(TINY | {"qk_norm": True})


def test_a_field_of_another_family_is_refused():
    with pytest.raises(UserError, match="sliding_window"):
        read_config(TINY | {"sliding_window": 4096})
    with pytest.raises(UserError, match="attention_bias"):
        read_config(MISTRAL_7B_V01 | {"attention_bias": True})


def test_unknown_field_that_says_nothing_is_accepted():
    assert read_config(TINY | {"qk_norm": None, "new_trick": False}) == read_config(TINY)


@pytest.mark.parametrize(
    "field",
    [
        name
        for name, value in FAMILIES["LlamaForCausalLM"].fields.items()
        if name not in ("hidden_size", "num_attention_heads")
    ],
)
def test_null_means_the_default(field):
    assert read_config(TINY | {field: None}) == read_config(TINY)


def test_null_window_means_no_window():
    assert read_config(MISTRAL_7B_V01 | {"sliding_window": None}).sliding_window is None
    silent = {key: value for key, value in MISTRAL_7B_V01.items() if key != "sliding_window"}
    assert read_config(silent).sliding_window == 4096


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "mish"}, {"is_encoder_decoder": True}],
    ids=lambda change: next(iter(change)),
)
def test_value_the_model_does_not_compute_is_refused(change):
    (_, value), *_ = change.items()
    with pytest.raises(UserError, match=rf"{value!r} is not supported; (expected|supported)"):
        read_config(TINY | change)


def test_unsupported_architecture_names_the_supported():
    with pytest.raises(UserError) as caught:
        read_config({"architectures": ["MambaForCausalLM"]})
    message = str(caught.value)
    assert "MambaForCausalLM" in message
    assert len(message) < 500
    groups = re.findall(r"([\w, ]+) \((\w+)\)", message.partition("supported: ")[2])
    told = {f"{stem}{end}" for stems, end in groups for stem in stems.strip().split(", ")}
    others = set(FAMILIES) - told
    assert "LlamaForCausalLM" in told
    assert all(name.endswith("ForSequenceClassification") for name in others)
    assert "classifiers of these (ForSequenceClassification)" in message
    with pytest.raises(UserError, match="none is not supported"):
        read_config({})


def test_model_type_stands_in_for_a_missing_architecture():
    by_type = {key: value for key, value in MISTRAL_7B_V01.items() if key != "architectures"}
    assert read_config(by_type) == read_config(MISTRAL_7B_V01)


def test_unsupported_rope_scaling_is_refused_by_name():
    for key in ("type", "rope_type"):
        with pytest.raises(UserError, match="'ntk' is not supported; supported: default, linear"):
            read_config(TINY | {"rope_scaling": {key: "ntk", "factor": 4.0}})


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_scaling_without_its_factor_is_the_users_to_mend(kind):
    with pytest.raises(UserError, match=r"config\.json: .*factor"):
        read_config(TINY | {"rope_scaling": {"rope_type": kind}})


def test_config_is_hashable_so_that_jit_can_take_it_as_static():
    cfg = read_config(LLAMA_3_1_8B)
    assert hash(cfg) == hash(dataclasses.replace(cfg))
