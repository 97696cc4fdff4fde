"""Decoders with layer norms and separate projections: Phi, StableLM, StarCoder2, Cohere 1, 2."""

from jaxlora.models.families.llama import FULL, LLAMA, NO_BIAS, SLIDING
from jaxlora.models.families.row import Family, Fields, field, layer_names, layers_of_type

LAYER_NORM = {"norm": "layer", "norm_bias": True}
ALL_BIAS = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
RMS_FIELDS = ("rms_norm_eps", "attention_bias", "mlp_bias")

PHI = LLAMA.but(
    fields={
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
    },
    without=RMS_FIELDS,
    config={
        **LAYER_NORM,
        **ALL_BIAS,
        "norm_eps": field("layer_norm_eps"),
        "norms": ("attention_in",),
        "parallel_block": True,
        "mlp_gated": False,
        "head_bias": True,
        "qk_norm": lambda f: "head" if f["qk_layernorm"] else None,
        "qk_norm_bias": True,
    },
    names={
        "norm": "model.final_layernorm",
        **layer_names(
            "model.layers.{layer}",
            {
                "attention/o_proj": "self_attn.dense",
                "attention/q_norm": "self_attn.q_layernorm",
                "attention/k_norm": "self_attn.k_layernorm",
                "mlp/up_proj": "mlp.fc1",
                "mlp/down_proj": "mlp.fc2",
            },
        ),
    },
)


def _one_norm_if(parallel: str):
    return lambda f: ("attention_in",) if f[parallel] else ("attention_in", "mlp_in")


STABLELM = LLAMA.but(
    fields={
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    without=RMS_FIELDS,
    config={
        **LAYER_NORM,
        **NO_BIAS,
        "norm_eps": field("layer_norm_eps"),
        "qkv_bias": field("use_qkv_bias"),
        "qk_norm": lambda f: "each_head" if f["qk_layernorm"] else None,
        "norms": _one_norm_if("use_parallel_residual"),
        "parallel_block": field("use_parallel_residual"),
    },
    expected={"rotary_scaling_factor": (1.0,)},
    names={  # a tensor for every head
        "layers/attention/q_norm/scale": (
            "model.layers.{layer}.self_attn.q_layernorm.norms.{part}.weight"
        ),
        "layers/attention/k_norm/scale": (
            "model.layers.{layer}.self_attn.k_layernorm.norms.{part}.weight"
        ),
    },
)

STARCODER2 = LLAMA.but(
    fields={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "use_bias": True,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    without=RMS_FIELDS,
    config={
        **LAYER_NORM,
        **dict.fromkeys(ALL_BIAS, field("use_bias")),
        "norm_eps": field("norm_epsilon"),
        "mlp_gated": False,
        "sliding_window": field("sliding_window"),
    },
    names=layer_names(
        "model.layers.{layer}", {"mlp/up_proj": "mlp.c_fc", "mlp/down_proj": "mlp.c_proj"}
    ),
    expected={
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
        "scale_attn_weights": (True,),
    },
    ignored=frozenset(  # of GPT-BigCode, written beside the fields that are read
        """activation_function attention_softmax_in_fp32 layer_norm_epsilon
        scale_attention_softmax_in_fp32""".split()
    ),
)

COHERE = LLAMA.but(
    fields={
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "logit_scale": 0.0625,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
    },
    without=("rms_norm_eps", "mlp_bias"),
    config={
        "norm": "layer",
        "norm_eps": field("layer_norm_eps"),
        "norms": ("attention_in",),
        "parallel_block": True,
        "mlp_bias": False,
        "rope_interleaved": True,
        "logit_scale": field("logit_scale"),
        "qk_norm": lambda f: "each_head" if f["use_qk_norm"] else None,
    },
    names=layer_names(
        "model.layers.{layer}.self_attn",
        {"attention/q_norm": "q_norm", "attention/k_norm": "k_norm"},
    ),
    ignored=frozenset(["model_max_length"]),
)


def _every_so_many_full(fields: Fields) -> list[str]:
    every = fields["sliding_window_pattern"]
    return [SLIDING if (n + 1) % every else FULL for n in range(fields["num_hidden_layers"])]


COHERE2 = COHERE.but(
    fields={
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    without=("use_qk_norm",),
    config={
        "qk_norm": None,
        "sliding_window": field("sliding_window"),
        "sliding_layers": layers_of_type(SLIDING, _every_so_many_full),
        "nope_layers": layers_of_type(FULL, _every_so_many_full),
    },
    expected={
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": (False,),
    },
    ignored=frozenset(["layer_switch", "model_max_length"]),
)

ROWS: dict[str, Family] = {
    "PhiForCausalLM": PHI,
    "StableLmForCausalLM": STABLELM,
    "Starcoder2ForCausalLM": STARCODER2,
    "CohereForCausalLM": COHERE,
    "Cohere2ForCausalLM": COHERE2,
}
