"""GPT-NeoX (Pythia), GPT-2 and Falcon: layer norms, one projection for queries, keys and values."""

from jaxlora.models.families.layernorm import ALL_BIAS, LAYER_NORM, RMS_FIELDS
from jaxlora.models.families.llama import LLAMA
from jaxlora.models.families.row import Family, Fields, field, layer_names

GPT_NEOX = LLAMA.but(
    fields={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_act": "gelu",
    },
    without=("rms_norm_eps", "mlp_bias", "num_key_value_heads", "head_dim", "rope_theta"),
    config={
        **LAYER_NORM,
        "mlp_bias": True,
        "norm_eps": field("layer_norm_eps"),
        "num_kv_heads": field("num_attention_heads"),
        "parallel_block": field("use_parallel_residual"),
        "qkv_layout": "grouped",
        "mlp_gated": False,
    },
    names={
        "embed": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "lm_head",  # transformers 5's name for it; in files it kept the older one
        "lm_head/kernel": "embed_out.weight",
        **layer_names(
            "gpt_neox.layers.{layer}",
            {
                "attention_in_norm": "input_layernorm",
                "attention/qkv_proj": "attention.query_key_value",
                "attention/o_proj": "attention.dense",
                "mlp_in_norm": "post_attention_layernorm",
                "mlp/up_proj": "mlp.dense_h_to_4h",
                "mlp/down_proj": "mlp.dense_4h_to_h",
            },
        ),
    },
    ignored=frozenset(["classifier_dropout"]),
    prefix="gpt_neox.",
    buffers=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
)

GPT2 = Family(
    fields={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    config={
        **LAYER_NORM,
        **ALL_BIAS,
        "vocab_size": field("vocab_size"),
        "embed_dim": field("n_embd"),
        "mlp_dim": lambda f: f["n_inner"] or 4 * f["n_embd"],
        "num_layers": field("n_layer"),
        "num_heads": field("n_head"),
        "num_kv_heads": field("n_head"),
        "head_dim": lambda f: f["n_embd"] // f["n_head"],
        "max_context": field("n_positions"),
        "learned_positions": field("n_positions"),
        "rotary_dim": 0,
        "norm_eps": field("layer_norm_epsilon"),
        "tie_embedding": field("tie_word_embeddings"),
        "activation": field("activation_function"),
        "attention_scale": lambda f: None if f["scale_attn_weights"] else 1.0,
        "qkv_layout": "concatenated",
        "mlp_gated": False,
        "conv1d": True,
        "init_std": field("initializer_range"),
    },
    names={
        "embed": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        **layer_names(
            "transformer.h.{layer}",
            {
                "attention_in_norm": "ln_1",
                "attention/qkv_proj": "attn.c_attn",
                "attention/o_proj": "attn.c_proj",
                "mlp_in_norm": "ln_2",
                "mlp/up_proj": "mlp.c_fc",
                "mlp/down_proj": "mlp.c_proj",
            },
        ),
    },
    expected={
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
    },
    ignored=frozenset(
        """summary_type summary_use_proj summary_activation summary_proj_to_labels
        summary_first_dropout n_ctx""".split()
    ),
    prefix="transformer.",
    buffers=("attn.bias", "attn.masked_bias"),
)


def _falcon_kv_heads(fields: Fields) -> int:
    heads = fields["num_attention_heads"]
    if fields["new_decoder_architecture"]:
        return fields["num_kv_heads"] or heads
    return 1 if fields["multi_query"] else heads


def _falcon_two_norms(fields: Fields) -> bool:
    count = fields["num_ln_in_parallel_attn"]
    return fields["new_decoder_architecture"] and count in (None, 2)


def _falcon_norms(fields: Fields) -> tuple[str, ...]:
    parallel = fields["new_decoder_architecture"] or fields["parallel_attn"]
    one = parallel and not _falcon_two_norms(fields)
    return ("attention_in",) if one else ("attention_in", "mlp_in")


_FALCON_TWO_NORMS = tuple(
    layer_names(
        "transformer.h.{layer}", {"attention_in_norm": "ln_attn", "mlp_in_norm": "ln_mlp"}
    ).items()
)

FALCON = LLAMA.but(
    fields={
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_attention_heads": 71,
        "num_kv_heads": None,
        "ffn_hidden_size": None,
        "layer_norm_epsilon": 1e-5,
        "num_ln_in_parallel_attn": None,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "activation": "gelu",
        "tie_word_embeddings": True,
    },
    without=(*RMS_FIELDS, "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act"),
    config={
        **LAYER_NORM,
        **dict.fromkeys(ALL_BIAS, field("bias")),
        "mlp_dim": lambda f: f["ffn_hidden_size"] or 4 * f["hidden_size"],
        "num_kv_heads": _falcon_kv_heads,
        "norm_eps": field("layer_norm_epsilon"),
        "norms": _falcon_norms,
        "parallel_block": lambda f: f["new_decoder_architecture"] or f["parallel_attn"],
        "qkv_layout": "grouped",
        "activation": field("activation"),
        "mlp_gated": False,
        "renamed": lambda f: _FALCON_TWO_NORMS if _falcon_two_norms(f) else (),
    },
    names={
        "embed": "transformer.word_embeddings",
        "norm": "transformer.ln_f",
        **layer_names(
            "transformer.h.{layer}",
            {
                "attention_in_norm": "input_layernorm",
                "attention/qkv_proj": "self_attention.query_key_value",
                "attention/o_proj": "self_attention.dense",
                "mlp_in_norm": "post_attention_layernorm",
                "mlp/up_proj": "mlp.dense_h_to_4h",
                "mlp/down_proj": "mlp.dense_4h_to_h",
            },
        ),
    },
    expected={"alibi": (False,)},
    prefix="transformer.",
)

ROWS: dict[str, Family] = {
    "GPTNeoXForCausalLM": GPT_NEOX,
    "GPT2LMHeadModel": GPT2,
    "FalconForCausalLM": FALCON,
}
