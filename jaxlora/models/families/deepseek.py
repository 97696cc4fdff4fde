"""DeepSeek-V2 and V3: latent attention, a mixture of experts after the first dense layers."""

from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.models.config import Mla, Moe
from jaxlora.models.families.experts import BALANCE, expert_names, shared_names
from jaxlora.models.families.llama import LLAMA
from jaxlora.models.families.rope import softmax_gain
from jaxlora.models.families.row import Family, Fields, field, layer_names
from jaxlora.ops.experts import Routing

# What follows from other fields, balances the load in pre-training, or says how it was run.
_IGNORED = BALANCE | set(
    """num_key_value_heads head_dim qk_head_dim aux_loss_alpha seq_aux ep_size
    num_mtp_layers""".split()
)


def _mla(fields: Fields) -> Mla:
    return Mla(
        q_rank=fields["q_lora_rank"],
        kv_rank=fields["kv_lora_rank"],
        rope_dim=fields["qk_rope_head_dim"],
        value_dim=fields["v_head_dim"],
    )


def _head_dim(fields: Fields) -> int:
    return fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]


def _moe(fields: Fields, routing: Routing, **options: Any) -> Moe:
    return Moe(
        layers=tuple(range(fields["first_k_dense_replace"], fields["num_hidden_layers"])),
        num_experts=fields["n_routed_experts"],
        mlp_dim=fields["moe_intermediate_size"],
        routing=routing,
        shared_dim=fields["moe_intermediate_size"] * (fields["n_shared_experts"] or 0),
        **options,
    )


def _groups(fields: Fields) -> dict[str, int]:
    return {"groups": fields["n_group"] or 1, "top_groups": fields["topk_group"] or 1}


def _v2_moe(fields: Fields) -> Moe:
    groups = {"greedy": {}, "group_limited_greedy": _groups(fields)}
    method = fields["topk_method"]
    if method not in groups:
        expected = " or ".join(groups)
        raise UserError(
            f"config.json: topk_method: {method!r} is not supported; expected {expected}."
        )
    scale = fields["routed_scaling_factor"]
    return _moe(fields, Routing(fields["num_experts_per_tok"], scale=scale, **groups[method]))


def _v3_moe(fields: Fields) -> Moe:
    routing = Routing(
        fields["num_experts_per_tok"],
        scoring="sigmoid",
        renormalize=fields["norm_topk_prob"],
        scale=fields["routed_scaling_factor"],
        group_best=2,
        **_groups(fields),
    )
    return _moe(fields, routing, correction=True)


DEEPSEEK_V2 = LLAMA.but(
    fields={
        "vocab_size": 102400,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
    },
    without=("num_key_value_heads", "head_dim"),
    config={
        "num_kv_heads": field("num_attention_heads"),
        "head_dim": _head_dim,
        "rotary_dim": field("qk_rope_head_dim"),
        "rope_interleaved": True,
        "attention_scale": lambda f: _head_dim(f) ** -0.5 * softmax_gain(f),
        "mla": _mla,
        "moe": _v2_moe,
    },
    names={
        **expert_names("mlp", "gate_proj", "up_proj", "down_proj"),
        **shared_names("shared_experts"),
        **layer_names(
            "model.layers.{layer}.self_attn",
            {
                "attention/q_a_proj": "q_a_proj",
                "attention/q_a_norm": "q_a_layernorm",
                "attention/q_b_proj": "q_b_proj",
                "attention/kv_a_proj": "kv_a_proj_with_mqa",
                "attention/kv_a_norm": "kv_a_layernorm",
                "attention/kv_b_proj": "kv_b_proj",
            },
        ),
    },
    expected={
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "moe_layer_freq": (1,),
    },
    ignored=_IGNORED,
)

DEEPSEEK_V3 = DEEPSEEK_V2.but(
    fields={
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 1,
    },
    without=("mlp_bias", "topk_method"),
    config={
        "mlp_bias": False,
        "rope_interleaved": field("rope_interleave"),
        "moe": _v3_moe,
        "extra_layers": field("num_nextn_predict_layers"),
    },
    names={
        "layers/mlp/correction": "model.layers.{layer}.mlp.gate.e_score_correction_bias",
    },
    expected={
        "topk_method": ("noaux_tc",),
        "scoring_func": ("sigmoid",),
        "moe_layer_freq": (1,),
    },
)

ROWS: dict[str, Family] = {
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
