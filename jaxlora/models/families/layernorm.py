"""Decoders with layer norms: GPT-2, GPT-NeoX, Falcon, Phi, StableLM, StarCoder2, Cohere."""

from jaxlora.models.families.llama import LLAMA, NO_BIAS
from jaxlora.models.families.row import Family, Fields, field, layer_names

_LAYER_NORM = {"norm": "layer", "norm_bias": True}
_ALL_BIAS = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
_RMS_FIELDS = ("rms_norm_eps", "attention_bias", "mlp_bias")

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
    without=_RMS_FIELDS,
    config={
        **_LAYER_NORM,
        **_ALL_BIAS,
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
    without=_RMS_FIELDS,
    config={
        **_LAYER_NORM,
        **NO_BIAS,
        "norm_eps": field("layer_norm_eps"),
        "qkv_bias": field("use_qkv_bias"),
        "qk_norm": lambda f: "each_head" if f["qk_layernorm"] else None,
        "norms": _one_norm_if("use_parallel_residual"),
        "parallel_block": field("use_parallel_residual"),
    },
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
    without=_RMS_FIELDS,
    config={
        **_LAYER_NORM,
        **dict.fromkeys(_ALL_BIAS, field("use_bias")),
        "norm_eps": field("norm_epsilon"),
        "mlp_gated": False,
        "sliding_window": field("sliding_window"),
    },
    names=layer_names(
        "model.layers.{layer}", {"mlp/up_proj": "mlp.c_fc", "mlp/down_proj": "mlp.c_proj"}
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
)

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
        **_LAYER_NORM,
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
        "lm_head": "embed_out",
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
        **_LAYER_NORM,
        **_ALL_BIAS,
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
        summary_first_dropout task_specific_params n_ctx""".split()
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
    without=(*_RMS_FIELDS, "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act"),
    config={
        **_LAYER_NORM,
        **dict.fromkeys(_ALL_BIAS, field("bias")),
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
    "PhiForCausalLM": PHI,
    "StableLmForCausalLM": STABLELM,
    "Starcoder2ForCausalLM": STARCODER2,
    "CohereForCausalLM": COHERE,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "GPT2LMHeadModel": GPT2,
    "FalconForCausalLM": FALCON,
}
