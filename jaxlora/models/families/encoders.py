"""Encoders for masked-language modelling: BERT, RoBERTa, ModernBERT."""

from jaxlora.models.families.llama import FULL, SLIDING
from jaxlora.models.families.row import SIZES, Family, Fields, field, layer_names, layers_of_type

_IGNORED = frozenset(
    """classifier_dropout mask_token_id directionality pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type""".split()
)

BERT = Family(
    fields={
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    config={
        **SIZES,
        "num_kv_heads": field("num_attention_heads"),
        "head_dim": lambda f: f["hidden_size"] // f["num_attention_heads"],
        "learned_positions": field("max_position_embeddings"),
        "token_types": field("type_vocab_size"),
        "rotary_dim": 0,
        "causal": False,
        "embed_norm": True,
        "norm": "layer",
        "norm_bias": True,
        "norm_eps": field("layer_norm_eps"),
        "norms": ("attention_sum", "mlp_sum"),
        "final_norm": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "mlp_gated": False,
        "activation": field("hidden_act"),
        "head_activation": field("hidden_act"),
        "head_bias": True,
        "renamed": lambda f: _untied_bias("cls.predictions.decoder.bias", f),
    },
    names={
        "embed": "bert.embeddings.word_embeddings",
        "embed_positions": "bert.embeddings.position_embeddings",
        "embed_types": "bert.embeddings.token_type_embeddings",
        "embed_norm": "bert.embeddings.LayerNorm",
        "head_transform/dense": "cls.predictions.transform.dense",
        "head_transform/norm": "cls.predictions.transform.LayerNorm",
        "lm_head": "cls.predictions.decoder",
        "lm_head/bias": "cls.predictions.bias",
        **layer_names(
            "bert.encoder.layer.{layer}",
            {
                "attention/q_proj": "attention.self.query",
                "attention/k_proj": "attention.self.key",
                "attention/v_proj": "attention.self.value",
                "attention/o_proj": "attention.output.dense",
                "attention_sum_norm": "attention.output.LayerNorm",
                "mlp/up_proj": "intermediate.dense",
                "mlp/down_proj": "output.dense",
                "mlp_sum_norm": "output.LayerNorm",
            },
        ),
    },
    expected={"position_embedding_type": ("absolute",), "is_decoder": (False,)},
    ignored=_IGNORED,
    prefix="bert.",
    buffers=(
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
        "cls.predictions.bias",  # one of the two is the other's copy, or unused
        "cls.predictions.decoder.bias",
    ),
    older=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
)


def _untied_bias(name: str, fields: Fields) -> tuple[tuple[str, str], ...]:
    """The head's bias has a name of its own where it is not shared along with the matrix."""
    return () if fields["tie_word_embeddings"] else (("lm_head/bias", name),)


def _first_row(fields: Fields) -> int:
    return fields["pad_token_id"] + 1


ROBERTA = BERT.but(
    fields={"vocab_size": 50265, "pad_token_id": 1},
    config={
        "max_context": lambda f: f["max_position_embeddings"] - _first_row(f),
        "position_offset": _first_row,
        "head_activation": "gelu",
        "renamed": lambda f: _untied_bias("lm_head.decoder.bias", f),
    },
    names={
        **{
            ours: theirs.replace("bert.", "roberta.")
            for ours, theirs in BERT.names.items()
            if isinstance(theirs, str)
        },
        "head_transform/dense": "lm_head.dense",
        "head_transform/norm": "lm_head.layer_norm",
        "lm_head": "lm_head.decoder",
        "lm_head/bias": "lm_head.bias",
    },
    prefix="roberta.",
    buffers=(
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
        "lm_head.bias",
        "lm_head.decoder.bias",
    ),
)


def _one_in_three(fields: Fields) -> list[str]:
    every = fields["global_attn_every_n_layers"]
    return [SLIDING if layer % every else FULL for layer in range(fields["num_hidden_layers"])]


MODERNBERT = Family(
    fields={
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "hidden_activation": "gelu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "decoder_bias": True,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "classifier_pooling": "cls",
        "layer_types": None,
        "global_attn_every_n_layers": 3,
        "local_attention": 128,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "rope_parameters": None,
        "tie_word_embeddings": True,
    },
    config={
        **SIZES,
        "num_kv_heads": field("num_attention_heads"),
        "head_dim": lambda f: f["hidden_size"] // f["num_attention_heads"],
        "causal": False,
        "sliding_window": lambda f: f["local_attention"] // 2 + 1,
        "sliding_layers": layers_of_type(SLIDING, _one_in_three),
        "embed_norm": True,
        "norm": "layer",
        "norm_bias": field("norm_bias"),
        "norm_eps": field("norm_eps"),
        "bare_layers": (0,),  # the norm of the embedding serves
        "qkv_layout": "concatenated",
        "qkv_bias": field("attention_bias"),
        "output_bias": field("attention_bias"),
        "mlp_fused": True,
        "mlp_bias": field("mlp_bias"),
        "activation": field("hidden_activation"),
        "head_activation": field("classifier_activation"),
        "head_dense_bias": field("classifier_bias"),
        "pooling": lambda f: {"cls": "first", "mean": "mean"}[f["classifier_pooling"]],
        "head_bias": field("decoder_bias"),
    },
    names={
        "embed": "model.embeddings.tok_embeddings",
        "embed_norm": "model.embeddings.norm",
        "norm": "model.final_norm",
        "head_transform/dense": "head.dense",
        "head_transform/norm": "head.norm",
        "lm_head": "decoder",
        "lm_head/bias": "decoder.bias",
        **layer_names(
            "model.layers.{layer}",
            {
                "attention_in_norm": "attn_norm",
                "attention/qkv_proj": "attn.Wqkv",
                "attention/o_proj": "attn.Wo",
                "mlp_in_norm": "mlp_norm",
                "mlp/gate_up_proj": "mlp.Wi",
                "mlp/down_proj": "mlp.Wo",
            },
        ),
    },
    ignored=_IGNORED
    | frozenset(
        """initializer_cutoff_factor mlp_dropout deterministic_flash_attn
        sparse_prediction sparse_pred_ignore_index layer_norm_eps position_embedding_type
        repad_logits_with_grad reference_compile""".split()
    ),
)

ROWS: dict[str, Family] = {
    "BertForMaskedLM": BERT,
    "RobertaForMaskedLM": ROBERTA,
    "ModernBertForMaskedLM": MODERNBERT,
}
