"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE and gpt-oss."""

from collections.abc import Callable

from jaxlora.models.config import Moe
from jaxlora.models.families.llama import FULL, MISTRAL, QWEN2, QWEN3, SLIDING
from jaxlora.models.families.row import Family, Fields, Names, field, layer_names, layers_of_type
from jaxlora.ops.experts import Routing

# A loss that balances the load, for training from scratch; fine-tuning here is without it.
BALANCE = frozenset(["router_aux_loss_coef", "output_router_logits"])
_LAYER = "model.layers.{layer}"


def expert_names(block: str, gate: str, up: str, down: str) -> Names:
    """Returns names of a router and experts that are stored one by one.

    Modules are named as transformers holds them since its version 5, which is what adapters refer
    to; tensors as they are in files.

    Args:
      block: what the layer's mixture of experts is called in files.
      gate, up, down: what an expert's matrices are called there.
    """
    stored = f"{_LAYER}.{block}.experts.{{part}}"
    return {
        **layer_names(
            f"{_LAYER}.mlp",
            {
                "mlp/router": "gate",
                "mlp/experts/gate_up_proj": "experts.gate_up_proj",
                "mlp/experts/down_proj": "experts.down_proj",
            },
        ),
        "layers/mlp/router/kernel": f"{_LAYER}.{block}.gate.weight",
        "layers/mlp/experts/gate_up_proj/kernel": (
            f"{stored}.{gate}.weight",
            f"{stored}.{up}.weight",
        ),
        "layers/mlp/experts/down_proj/kernel": f"{stored}.{down}.weight",
    }


def shared_names(module: str) -> Names:
    """Returns names of the MLP that all tokens pass, and of its gate."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return layer_names(
        f"{_LAYER}.mlp",
        {
            **{f"mlp/shared/{part}": f"{module}.{part}" for part in parts},
            "mlp/shared_gate": f"{module}_gate",
        },
    )


def sparse_layers(fields: Fields) -> tuple[int, ...]:
    """Returns the layers with experts: every so many, less those listed as dense."""
    every, dense = fields["decoder_sparse_step"], fields["mlp_only_layers"] or ()
    layers = range(fields["num_hidden_layers"])
    return tuple(n for n in layers if n not in dense and (n + 1) % every == 0)


def _mixtral(fields: Fields) -> Moe:
    return Moe(
        layers=tuple(range(fields["num_hidden_layers"])),
        num_experts=fields["num_local_experts"],
        mlp_dim=fields["intermediate_size"],
        routing=Routing(fields["num_experts_per_tok"], renormalize=True),
    )


def _qwen(shared: Callable[[Fields], int]) -> Callable[[Fields], Moe]:
    def moe(fields: Fields) -> Moe:
        return Moe(
            layers=sparse_layers(fields),
            num_experts=fields["num_local_experts"] or fields["num_experts"],
            mlp_dim=fields["moe_intermediate_size"],
            routing=Routing(fields["num_experts_per_tok"], renormalize=fields["norm_topk_prob"]),
            shared_dim=shared(fields),
            shared_gate=shared(fields) > 0,
        )

    return moe


MIXTRAL = MISTRAL.but(
    fields={
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    config={"moe": _mixtral},
    names=expert_names("block_sparse_moe", "w1", "w3", "w2"),
    expected={"router_jitter_noise": (0.0,)},
    ignored=BALANCE,
)

_QWEN_FIELDS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "num_local_experts": None,
}


def _alternate_early_windows(fields: Fields) -> list[str]:
    first = fields["max_window_layers"] if fields["use_sliding_window"] else 0
    layers = range(fields["num_hidden_layers"])
    return [SLIDING if n % 2 == 0 and n < first else FULL for n in layers]


_QWEN_NAMES = expert_names("mlp", "gate_proj", "up_proj", "down_proj")

QWEN2_MOE = QWEN2.but(
    fields={
        **_QWEN_FIELDS,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    config={
        "qkv_bias": field("qkv_bias"),
        "sliding_layers": layers_of_type(SLIDING, _alternate_early_windows),
        "moe": _qwen(field("shared_expert_intermediate_size")),
    },
    names={**_QWEN_NAMES, **shared_names("shared_expert")},
    ignored=BALANCE,
)
QWEN3_MOE = QWEN3.but(
    fields={
        **_QWEN_FIELDS,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    without=("max_window_layers", "layer_types"),
    config={"sliding_layers": None, "moe": _qwen(lambda fields: 0)},
    names=_QWEN_NAMES,
    ignored=BALANCE | {"max_window_layers"},
)


def _gpt_oss(fields: Fields) -> Moe:
    return Moe(
        layers=tuple(range(fields["num_hidden_layers"])),
        num_experts=fields["num_local_experts"],
        mlp_dim=fields["intermediate_size"],
        routing=Routing(fields["num_experts_per_tok"], "chosen_softmax"),
        router_bias=True,
        bias=True,
        transposed=False,
        interleaved=True,
        clamp=fields["swiglu_limit"],
        gain=fields["swiglu_alpha"],
    )


def _every_other_window(fields: Fields) -> list[str]:
    return [FULL if n % 2 else SLIDING for n in range(fields["num_hidden_layers"])]


GPT_OSS = MISTRAL.but(
    fields={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "layer_types": None,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
    config={
        "qkv_bias": field("attention_bias"),
        "output_bias": field("attention_bias"),
        "attention_sinks": True,
        "sliding_layers": layers_of_type(SLIDING, _every_other_window),
        "moe": _gpt_oss,
    },
    names={
        **layer_names(
            _LAYER,
            {
                "attention/sinks": "self_attn.sinks",
                "mlp/router": "mlp.router",
                "mlp/experts/gate_up_proj": "mlp.experts.gate_up_proj",
                "mlp/experts/gate_up_proj/kernel": "mlp.experts.gate_up_proj",
                "mlp/experts/gate_up_proj/bias": "mlp.experts.gate_up_proj_bias",
                "mlp/experts/down_proj": "mlp.experts.down_proj",
                "mlp/experts/down_proj/kernel": "mlp.experts.down_proj",
                "mlp/experts/down_proj/bias": "mlp.experts.down_proj_bias",
            },
        ),
    },
    ignored=BALANCE | {"initial_context_length", "experts_per_token"},
)

ROWS: dict[str, Family] = {
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "GptOssForCausalLM": GPT_OSS,
}
