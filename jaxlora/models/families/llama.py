"""LLaMA and the families that are LLaMA with a few changes."""

from jaxlora.models.families.row import SIZES, Family, Fields, field, layer_names, layers_of_type

LLAMA = Family(
    fields={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    },
    config={
        **SIZES,
        "num_kv_heads": lambda f: f["num_key_value_heads"] or f["num_attention_heads"],
        "head_dim": lambda f: f.get("head_dim") or f["hidden_size"] // f["num_attention_heads"],
        "norm_eps": field("rms_norm_eps"),
        "qkv_bias": field("attention_bias"),
        "output_bias": field("attention_bias"),
        "mlp_bias": field("mlp_bias"),
        "activation": field("hidden_act"),
    },
    names={
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "lm_head": "lm_head",
        **layer_names(
            "model.layers.{layer}",
            {
                "attention_in_norm": "input_layernorm",
                "attention/q_proj": "self_attn.q_proj",
                "attention/k_proj": "self_attn.k_proj",
                "attention/v_proj": "self_attn.v_proj",
                "attention/o_proj": "self_attn.o_proj",
                "mlp_in_norm": "post_attention_layernorm",
                "mlp/gate_proj": "mlp.gate_proj",
                "mlp/up_proj": "mlp.up_proj",
                "mlp/down_proj": "mlp.down_proj",
            },
        ),
    },
    buffers=("rotary_emb.inv_freq",),
)
_QK_NORMS = layer_names(
    "model.layers.{layer}.self_attn", {"attention/q_norm": "q_norm", "attention/k_norm": "k_norm"}
)
FUSED_GATE_UP = layer_names("model.layers.{layer}", {"mlp/gate_up_proj": "mlp.gate_up_proj"})
NO_BIAS = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
SLIDING, FULL = "sliding_attention", "full_attention"

MISTRAL = LLAMA.but(
    fields={
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    without=("attention_bias", "mlp_bias"),
    config={**NO_BIAS, "sliding_window": field("sliding_window")},
)


def _late_windows(fields: Fields) -> list[str]:
    slides = fields["use_sliding_window"] and fields["sliding_window"] is not None
    first = fields["max_window_layers"] if slides else fields["num_hidden_layers"]
    return [SLIDING if n >= first else FULL for n in range(fields["num_hidden_layers"])]


QWEN2 = LLAMA.but(
    fields={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    without=("attention_bias", "mlp_bias"),
    config={
        "qkv_bias": True,
        "output_bias": False,
        "mlp_bias": False,
        "sliding_window": lambda f: f["sliding_window"] if f["use_sliding_window"] else None,
        "sliding_layers": layers_of_type(SLIDING, _late_windows),
    },
)
QWEN3 = QWEN2.but(
    fields={"attention_bias": False, "head_dim": 128},
    config={
        "qkv_bias": field("attention_bias"),
        "output_bias": field("attention_bias"),
        "qk_norm": "head",
    },
    names=_QK_NORMS,
)


def _no_rope_types(fields: Fields) -> list[int]:
    if fields["no_rope_layers"] is not None:
        return fields["no_rope_layers"]
    every = fields["no_rope_layer_interval"]
    return [int((layer + 1) % every != 0) for layer in range(fields["num_hidden_layers"])]


def _windows_without_rope(fields: Fields) -> list[str]:
    slides = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return [SLIDING if slides and not rope else FULL for rope in _no_rope_types(fields)]


SMOLLM3 = LLAMA.but(
    fields={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    config={
        "sliding_window": field("sliding_window"),
        "sliding_layers": layers_of_type(SLIDING, _windows_without_rope),
        "nope_layers": lambda f: tuple(
            layer for layer, rope in enumerate(_no_rope_types(f)) if not rope
        ),
    },
    ignored=frozenset(["max_window_layers"]),
)

GRANITE = LLAMA.but(
    fields={
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    config={
        "embed_scale": field("embedding_multiplier"),
        "logit_scale": lambda f: 1.0 / f["logits_scaling"],
        "residual_scale": field("residual_multiplier"),
        "attention_scale": field("attention_multiplier"),
    },
)

OLMO2 = LLAMA.but(
    fields={"vocab_size": 50304, "rms_norm_eps": 1e-5},
    without=("mlp_bias", "head_dim"),
    config={"mlp_bias": False, "qk_norm": "full", "norms": ("attention_out", "mlp_out")},
    names={
        **_QK_NORMS,
        **layer_names(
            "model.layers.{layer}",
            {
                "attention_out_norm": "post_attention_layernorm",
                "mlp_out_norm": "post_feedforward_layernorm",
            },
        ),
    },
)


def _three_in_four(fields: Fields) -> list[str]:
    return [FULL if n % 4 == 3 else SLIDING for n in range(fields["num_hidden_layers"])]


OLMO3 = OLMO2.but(
    fields={
        "rope_theta": 500000.0,
        "rope_local_base_freq": None,
        "sliding_window": 4096,
        "layer_types": None,
    },
    config={
        "sliding_window": field("sliding_window"),
        "sliding_layers": layers_of_type(SLIDING, _three_in_four),
    },
)

SEED_OSS = LLAMA.but(
    fields={
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    config={"output_bias": field("attention_out_bias")},
)

ARCEE = LLAMA.but(
    fields={
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "relu2",
    },
    config={"mlp_gated": False},
)

HELIUM = LLAMA.but(
    fields={
        "vocab_size": 48000,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
    },
    config={"output_bias": False, "rope_interleaved": True},
)

PHI3 = LLAMA.but(
    fields={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    without=("attention_bias", "mlp_bias"),
    config={
        **NO_BIAS,
        "sliding_window": field("sliding_window"),
        "qkv_layout": "concatenated",
        "mlp_fused": True,
    },
    names={
        **FUSED_GATE_UP,
        **layer_names("model.layers.{layer}", {"attention/qkv_proj": "self_attn.qkv_proj"}),
    },
    # Of the code that came with Phi-4-mini; transformers' own has neither.
    expected={"full_attn_mod": (1,), "interpolate_factor": (1,)},
)

ROWS: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "SmolLM3ForCausalLM": SMOLLM3,
    "GraniteForCausalLM": GRANITE,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "SeedOssForCausalLM": SEED_OSS,
    "ArceeForCausalLM": ARCEE,
    "HeliumForCausalLM": HELIUM,
    "Phi3ForCausalLM": PHI3,
}
