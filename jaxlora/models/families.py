"""Model families as data: one row of differences each, read from a Hugging Face config.json.

A field that is neither translated nor knowingly ignored is refused by name: a model that silently
differs from its reference is worse than one that does not load.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.models.config import ModelConfig
from jaxlora.ops.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """What the fields of one architecture's config.json mean.

    Attributes:
      defaults: what Hugging Face assumes where the file is silent; a field named here is handled.
    """

    defaults: Mapping[str, Any]


_LLAMA_FIELDS: dict[str, Any] = {
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
}
_MISTRAL_CHANGES: dict[str, Any] = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_LLAMA_FIELDS),
    "MistralForCausalLM": Family(
        {
            field: value
            for field, value in (_LLAMA_FIELDS | _MISTRAL_CHANGES).items()
            if field not in ("attention_bias", "mlp_bias")
        }
    ),
}

# Fields whose listed values ask for exactly what the transformer does; any other value is refused.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attention_dropout": (0, 0.0),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
}
# Fields that do not change what the model computes.
_IGNORED = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id
    eos_token_id pad_token_id pretraining_tp name_or_path auto_map id2label label2id problem_type
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 tokenizer_class
    is_decoder unsloth_version unsloth_fixed max_length max_sequence_length is_llama_config
    transformers.js_config
    """.split()
)

# Rope scalings and the fields they need, in the order of `RopeScaling`.
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def supported() -> str:
    """Returns the supported architectures as text for messages."""
    return ", ".join(sorted(FAMILIES))


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Translates the content of a Hugging Face config.json.

    Raises:
      UserError: unsupported architecture, a field we do not know, or a value we do not handle.

    >>> read_config({"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    ...              "num_attention_heads": 4}).head_dim
    16
    """
    family = FAMILIES[_architecture(hf)]
    _refuse_unknown(hf, family)
    # null stands for the default, but a null window is no window (Mistral 0.2 and later).
    given = {k: value for k, value in hf.items() if value is not None or k == "sliding_window"}
    field: dict[str, Any] = {
        name: given.get(name, default) for name, default in family.defaults.items()
    }
    rope = _rope_fields(field)
    heads = field["num_attention_heads"]
    return ModelConfig(
        vocab_size=field["vocab_size"],
        embed_dim=field["hidden_size"],
        mlp_dim=field["intermediate_size"],
        num_layers=field["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=field["num_key_value_heads"] or heads,
        head_dim=field["head_dim"] or field["hidden_size"] // heads,
        max_context=field["max_position_embeddings"],
        norm_eps=field["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, field["max_position_embeddings"]),
        sliding_window=field.get("sliding_window"),
        tie_embedding=field["tie_word_embeddings"],
        attention_bias=field.get("attention_bias", False),
        mlp_bias=field.get("mlp_bias", False),
        init_std=field["initializer_range"],
    )


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures") or []
    if not names and "model_type" in hf:  # some older repositories name only the type
        names = [f"{str(hf['model_type']).capitalize()}ForCausalLM"]
    for name in names:
        if name in FAMILIES:
            return name
    got = ", ".join(map(str, names)) or "none"
    raise UserError(f"config.json: architecture {got} is not supported; supported: {supported()}.")


def _refuse_unknown(hf: Mapping[str, Any], family: Family) -> None:
    for name, value in hf.items():
        if name in family.defaults or name in _IGNORED or name.startswith("_"):
            continue
        if value is None or value in _EXPECTED.get(name, ()):
            continue
        if name in _EXPECTED:
            wanted = " or ".join(repr(option) for option in _EXPECTED[name])
            raise UserError(f"config.json: {name}: {value!r} is not supported; expected {wanted}.")
        if value is False:
            continue
        raise UserError(
            f"config.json: {name}: {value!r} is a field jaxlora does not know, so the model might "
            f"differ from its reference.{did_you_mean(name, family.defaults)} Architectures "
            f"supported: {supported()}."
        )


def _rope_fields(field: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes one `rope_parameters`; earlier files have `rope_theta` + `rope_scaling`.
    scaling = field["rope_parameters"] or field["rope_scaling"] or {}
    return {"rope_theta": field["rope_theta"], **scaling}


def _rope_scaling(rope: Mapping[str, Any], max_context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _ROPE_NUMBERS:
        raise UserError(
            f"config.json: rope scaling {kind!r} is not supported; "
            f"supported: default, {', '.join(_ROPE_NUMBERS)}."
        )
    for name in _ROPE_NUMBERS[kind]:
        if name not in rope:
            raise UserError(f"config.json: rope scaling {kind!r} has no {name}; add it.")
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope.get("original_max_position_embeddings", max_context)),
    )
