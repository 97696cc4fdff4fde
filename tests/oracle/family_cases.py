"""Tiny configurations of every supported family, with odd sizes, for the comparison with
transformers. A family has as many cases as its config has switches that change the arithmetic."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_GQA = {name: value for name, value in _TINY.items() if name != "num_key_value_heads"}
_FALCON = {name: value for name, value in _NO_GQA.items() if name != "intermediate_size"}
_WIDE_HEADS = {**_TINY, "head_dim": 10}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 3.0, 5.0],
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
_SHARED = {"shared_expert_intermediate_size": 18}
_LATENT = {
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "moe_intermediate_size": 14,
}
_GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
_DEEPSEEK_YARN = {
    **_YARN,
    "rope_theta": 1e4,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

# Odd sizes throughout: nothing may depend on a dimension being even or a power of two, except
# head_dim, which rotary embeddings halve.
ODD_SIZES = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}
# In 100 tokens the first three of 5 channel pairs turn 15.9, 1.15 and 0.08 times: one above
# llama3's borders of 1 and 4, one between and one below.
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
      family: key of `jaxlora.models.families.FAMILIES`, which is transformers' class.
      config: transformers' config class.
      fields: its arguments.
      inapplicable: columns of the family matrix that do not apply, with the reason.
    """

    family: str
    config: str
    fields: dict[str, Any]
    inapplicable: Mapping[str, str] = dataclasses.field(default_factory=dict)


# What configs call the epsilon of norms, where not rms_norm_eps.
_EPSILONS = {
    **dict.fromkeys(("PhiForCausalLM", "StableLmForCausalLM"), "layer_norm_eps"),
    **dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM"), "layer_norm_eps"),
    **dict.fromkeys(("GPTNeoXForCausalLM", "BertForMaskedLM"), "layer_norm_eps"),
    "RobertaForMaskedLM": "layer_norm_eps",
    "ModernBertForMaskedLM": "norm_eps",
    "Starcoder2ForCausalLM": "norm_epsilon",
    **dict.fromkeys(("GPT2LMHeadModel", "FalconForCausalLM"), "layer_norm_epsilon"),
}


def _case(family: str, config: str = "", /, **fields: Any) -> Case:
    config = config or family.replace("ForCausalLM", "Config")
    # The usual 1e-6 shows too little: a row that read another field would pass.
    return Case(family, config, {_EPSILONS.get(family, "rms_norm_eps"): 2e-3, **fields})


def _without(case: Case, **inapplicable: str) -> Case:
    return dataclasses.replace(case, inapplicable=inapplicable)


_ENCODER = {**_NO_GQA, "cls_token_id": 1, "sep_token_id": 2}


def _encoder(family: str, **fields: Any) -> Case:
    return _case(family, family.replace("ForMaskedLM", "Config"), **{**_ENCODER, **fields})


CASES: dict[str, Case] = {
    "llama 1": _case("LlamaForCausalLM", **{**_TINY, "num_key_value_heads": 4}),
    "llama 2, gqa": _case("LlamaForCausalLM", **_TINY),
    "llama 3.1": _case(
        "LlamaForCausalLM",
        **_WIDE_HEADS,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama, biases, linear": _case(
        "LlamaForCausalLM",
        **{**_TINY, "num_key_value_heads": 1},
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    ),
    "llama, yarn": _case(
        "LlamaForCausalLM",
        **_TINY,
        rope_parameters={**_YARN, "rope_theta": 1e4},
    ),
    "llama, dynamic": _without(
        _case(
            "LlamaForCausalLM",
            **{**_TINY, "max_position_embeddings": 16},
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        generation="generation ends at max_position_embeddings, where this scaling begins",
    ),
    "mistral 0.1": _case("MistralForCausalLM", **_TINY, sliding_window=7),
    "mistral nemo": _case("MistralForCausalLM", **_WIDE_HEADS, sliding_window=None),
    "qwen2": _case("Qwen2ForCausalLM", **_TINY),
    "qwen2, window": _case(
        "Qwen2ForCausalLM",
        **_TINY,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": _case("Qwen3ForCausalLM", **_WIDE_HEADS),
    "qwen3, biases": _case(
        "Qwen3ForCausalLM",
        **_WIDE_HEADS,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "smollm3": _case("SmolLM3ForCausalLM", **_TINY, no_rope_layer_interval=2),
    "smollm3, window": _case(
        "SmolLM3ForCausalLM",
        **_TINY,
        no_rope_layers=[1, 0, 0],
        use_sliding_window=True,
        sliding_window=5,
    ),
    "granite": _case(
        "GraniteForCausalLM",
        **_TINY,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.6,
        attention_multiplier=0.3,
    ),
    "olmo 2": _case("Olmo2ForCausalLM", **_TINY),
    "olmo 3": _case(
        "Olmo3ForCausalLM",
        **{**_TINY, "num_hidden_layers": 5},
        sliding_window=5,
        rope_scaling={**_YARN, "attention_factor": 1.2},
        rope_theta=5e4,
    ),
    "seed-oss": _case("SeedOssForCausalLM", **_WIDE_HEADS),
    "seed-oss, biases": _case(
        "SeedOssForCausalLM", **_WIDE_HEADS, attention_out_bias=True, mlp_bias=True
    ),
    "arcee": _case("ArceeForCausalLM", **_WIDE_HEADS, attention_bias=True, mlp_bias=True),
    "helium": _case("HeliumForCausalLM", **_TINY, head_dim=6, attention_bias=True, mlp_bias=True),
    "phi-3": _case("Phi3ForCausalLM", **_TINY),
    "phi-3.5, longrope": _case(
        "Phi3ForCausalLM",
        **_TINY,
        original_max_position_embeddings=16,
        rope_parameters={**_LONGROPE, "rope_theta": 1e4, "attention_factor": 1.1},
        sliding_window=9,
    ),
    "phi-4-mini": _case(
        "Phi3ForCausalLM",
        **{**_TINY, "hidden_size": 32},
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_parameters={**_LONGROPE, "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    "glm": _case("GlmForCausalLM", **{**_TINY, "head_dim": 12}),
    "glm-4": _case("Glm4ForCausalLM", **{**_TINY, "head_dim": 12}, attention_bias=False),
    "gemma": _case("GemmaForCausalLM", **_WIDE_HEADS),
    "gemma 2": _case(
        "Gemma2ForCausalLM", **_WIDE_HEADS, sliding_window=5, query_pre_attn_scalar=17
    ),
    "gemma 3": _case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **{**_WIDE_HEADS, "num_hidden_layers": 4},
        sliding_window=5,
        query_pre_attn_scalar=17,
        layer_types=[*_SLIDING, "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mixtral": _case("MixtralForCausalLM", **_TINY, num_local_experts=5),
    "mixtral, window, 3 of 4": _case(
        "MixtralForCausalLM",
        **_WIDE_HEADS,
        num_local_experts=4,
        num_experts_per_tok=3,
        sliding_window=5,
        tie_word_embeddings=True,
    ),
    "qwen2-moe": _case("Qwen2MoeForCausalLM", **_TINY, **_EXPERTS, **_SHARED),
    "qwen2-moe, mixed layers": _case(
        "Qwen2MoeForCausalLM",
        **{**_TINY, "num_hidden_layers": 5},
        **_EXPERTS,
        **_SHARED,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=3,
    ),
    "qwen3-moe": _case("Qwen3MoeForCausalLM", **_WIDE_HEADS, **_EXPERTS, norm_topk_prob=True),
    "qwen3-moe, mixed layers": _case(
        "Qwen3MoeForCausalLM",
        **{**_TINY, "num_hidden_layers": 7},
        **_EXPERTS,
        attention_bias=True,
        decoder_sparse_step=2,
        mlp_only_layers=[5],
        use_sliding_window=True,
        sliding_window=6,
    ),
    "deepseek-v2-lite": _case(
        "DeepseekV2ForCausalLM",
        **_NO_GQA,
        **_LATENT,
        n_routed_experts=6,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        q_lora_rank=None,
        rms_norm_eps=1e-5,
    ),
    "deepseek-v2": _case(
        "DeepseekV2ForCausalLM",
        **_NO_GQA,
        **_LATENT,
        **_GROUPS,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.9,
        q_lora_rank=10,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=_DEEPSEEK_YARN,
    ),
    "deepseek-v3": _case(
        "DeepseekV3ForCausalLM",
        **{**_TINY, "num_key_value_heads": 4},
        **_LATENT,
        **_GROUPS,
        first_k_dense_replace=2,
        q_lora_rank=10,
        routed_scaling_factor=1.7,
        rope_parameters={**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek-v3, one group": _case(
        "DeepseekV3ForCausalLM",
        **{**_TINY, "num_key_value_heads": 4},
        **_LATENT,
        **{**_GROUPS, "n_group": 1, "topk_group": 1},
        first_k_dense_replace=0,
        q_lora_rank=None,
        norm_topk_prob=False,
        attention_bias=True,
        rope_interleave=False,
        tie_word_embeddings=True,
    ),
    "gpt-oss": _case(
        "GptOssForCausalLM",
        **{**_WIDE_HEADS, "num_hidden_layers": 4},
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=5,
    ),
    "gpt-oss, clamped": _case(
        "GptOssForCausalLM",
        **{**_WIDE_HEADS, "num_key_value_heads": 1},
        num_local_experts=4,
        num_experts_per_tok=3,
        sliding_window=7,
        layer_types=_SLIDING,
        swiglu_limit=0.8,
        swiglu_alpha=1.3,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "phi-2": _case("PhiForCausalLM", **{**_TINY, "hidden_size": 32}),
    "phi, qk norm": _case("PhiForCausalLM", **{**_TINY, "hidden_size": 32}, qk_layernorm=True),
    "stablelm": _case("StableLmForCausalLM", **{**_TINY, "hidden_size": 32}),
    "stablelm 2": _case(
        "StableLmForCausalLM",
        **{**_TINY, "hidden_size": 32},
        use_qkv_bias=True,
        qk_layernorm=True,
        use_parallel_residual=True,
    ),
    "starcoder2": _case("Starcoder2ForCausalLM", **_TINY, sliding_window=6),
    "starcoder2, no bias": _case("Starcoder2ForCausalLM", **_TINY, use_bias=False),
    "command-r": _case("CohereForCausalLM", **_TINY, logit_scale=0.7),
    "command-r+": _case(
        "CohereForCausalLM", **_TINY, logit_scale=0.9, use_qk_norm=True, attention_bias=True
    ),
    "command-r7b": _case(
        "Cohere2ForCausalLM",
        **{**_TINY, "num_hidden_layers": 5},
        sliding_window=5,
        logit_scale=0.8,
    ),
    "pythia": _case(
        "GPTNeoXForCausalLM",
        **{**_NO_GQA, "hidden_size": 32},
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "gpt-neox, sequential": _case(
        "GPTNeoXForCausalLM",
        **{**_NO_GQA, "hidden_size": 32},
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_theta": 2e4, "partial_rotary_factor": 0.5},
    ),
    "gpt-2": _case(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=61,
        n_positions=64,
        n_embd=24,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon 7b": _case("FalconForCausalLM", **_FALCON),
    "falcon 40b": _case(
        "FalconForCausalLM",
        **_FALCON,
        new_decoder_architecture=True,
        num_kv_heads=2,
        tie_word_embeddings=False,
    ),
    "falcon 2 11b": _case(
        "FalconForCausalLM",
        **_FALCON,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        bias=True,
    ),
    "bert": _encoder("BertForMaskedLM"),
    "bert, untied, relu": _encoder(
        "BertForMaskedLM", hidden_act="relu", tie_word_embeddings=False, layer_norm_eps=1e-3
    ),
    "roberta": _encoder("RobertaForMaskedLM", pad_token_id=1, bos_token_id=0, type_vocab_size=1),
    "roberta, gelu_new": _encoder("RobertaForMaskedLM", hidden_act="gelu_new"),
    "roberta, untied": _encoder("RobertaForMaskedLM", tie_word_embeddings=False),
    "modernbert": _encoder("ModernBertForMaskedLM", num_hidden_layers=4, local_attention=8),
    "modernbert, biases": _encoder(
        "ModernBertForMaskedLM",
        local_attention=6,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        classifier_bias=True,
        decoder_bias=False,
        classifier_activation="relu",
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=False,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 9e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "falcon, sequential": _case(
        "FalconForCausalLM", **_FALCON, multi_query=False, parallel_attn=False, bias=True
    ),
}


def _classifier(case: Case, labels: int, **fields: Any) -> Case:
    family = re.sub(r"(For\w+|LMHeadModel)$", "ForSequenceClassification", case.family)
    family = family.replace("Gemma3For", "Gemma3TextFor")
    return Case(family, case.config, {**case.fields, "num_labels": labels, **fields})


# One case of every family that transformers has a classifier of.
_NO_CLASSIFIER = ("GraniteForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM")
CLASSIFIERS: dict[str, Case] = {
    f"{name}, labels": _classifier(case, 5)
    for name, case in {case.family: (name, case) for name, case in CASES.items()}.values()
    if case.family not in _NO_CLASSIFIER
} | {
    "bert, two labels": _classifier(CASES["bert"], 2),
    "modernbert, mean": _classifier(CASES["modernbert"], 3, classifier_pooling="mean"),
}

# Cases of which the default test run checks every column; the others wait for `make oracle`.
FAST = ("llama 3.1", "gpt-2")
