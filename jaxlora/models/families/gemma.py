"""Gemma 1, 2 and 3 (text): norms with an offset of one, scaled embeddings, wide heads."""

from jaxlora.models.families.llama import FULL, LLAMA, SLIDING
from jaxlora.models.families.row import Family, Fields, field, layer_names, layers_of_type

GEMMA = LLAMA.but(
    fields={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    without=("mlp_bias",),
    config={
        "mlp_bias": False,
        "norm_offset": 1.0,
        "embed_scale": lambda f: f["hidden_size"] ** 0.5,
    },
    expected={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
    },
)


def _alternating(fields: Fields) -> list[str]:
    return [FULL if layer % 2 else SLIDING for layer in range(fields["num_hidden_layers"])]


GEMMA2 = GEMMA.but(
    fields={
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    without=("hidden_act",),
    config={
        "activation": field("hidden_activation"),
        "attention_scale": lambda f: f["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": field("attn_logit_softcapping"),
        "logit_softcap": field("final_logit_softcapping"),
        "sliding_window": field("sliding_window"),
        "sliding_layers": layers_of_type(SLIDING, _alternating),
        "norms": ("attention_in", "attention_out", "mlp_in", "mlp_out"),
    },
    names=layer_names(
        "model.layers.{layer}",
        {
            "attention_out_norm": "post_attention_layernorm",
            "mlp_in_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        },
    ),
    expected={
        "hidden_act": ("gelu_pytorch_tanh",),  # written beside hidden_activation, not read
        "use_bidirectional_attention": (False,),
    },
)


def _five_to_one(fields: Fields) -> list[str]:
    every = fields["sliding_window_pattern"]
    layers = range(fields["num_hidden_layers"])
    return [SLIDING if (layer + 1) % every else FULL for layer in layers]


GEMMA3 = GEMMA2.but(
    fields={
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    config={"qk_norm": "head", "sliding_layers": layers_of_type(SLIDING, _five_to_one)},
    names=layer_names(
        "model.layers.{layer}.self_attn",
        {"attention/q_norm": "q_norm", "attention/k_norm": "k_norm"},
    ),
)

ROWS: dict[str, Family] = {
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
}
