"""GLM-4: LLaMA with half of each head turned, in pairs, and gate and up in one matrix."""

from typing import Any

from jaxlora.models.families.llama import FUSED_GATE_UP, LLAMA
from jaxlora.models.families.row import Family, layer_names

_GLM_CONFIG: dict[str, Any] = {
    "output_bias": False,
    "mlp_bias": False,
    "mlp_fused": True,
    "rope_interleaved": True,
}
GLM = LLAMA.but(
    fields={
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 0.00000015625,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    without=("mlp_bias",),
    config=_GLM_CONFIG,
    names=FUSED_GATE_UP,
)
GLM4 = GLM.but(
    config={"norms": ("attention_in", "attention_out", "mlp_in", "mlp_out")},
    names=layer_names(
        "model.layers.{layer}",
        {
            "attention_out_norm": "post_self_attn_layernorm",
            "mlp_out_norm": "post_mlp_layernorm",
        },
    ),
)

ROWS: dict[str, Family] = {"GlmForCausalLM": GLM, "Glm4ForCausalLM": GLM4}
