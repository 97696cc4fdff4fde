"""config.json in, `ModelConfig` out, by the table of families.

A field that is neither translated nor knowingly ignored is refused by name: a model that silently
differs from its reference is worse than one that does not load.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import FAMILIES, Family
from jaxlora.models.families.rope import read_rope
from jaxlora.ops.activations import ACTIVATIONS

# Fields whose listed values ask for exactly what the model does; any other value is refused.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
}
# Fields that do not change what the model computes. Dropout among them: a base was pre-trained
# with it, and is fine-tuned without; `lora_dropout` is where an adapter's goes.
_IGNORED = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id
    eos_token_id pad_token_id pretraining_tp name_or_path auto_map id2label label2id
    problem_type output_attentions output_hidden_states return_dict torchscript use_bfloat16
    tokenizer_class is_decoder unsloth_version unsloth_fixed max_length max_sequence_length
    model_max_length is_llama_config transformers.js_config cache_implementation
    attn_implementation output_past custom_pipelines finetuning_task task_specific_params
    gradient_checkpointing neftune_noise_alpha sep_token_id cls_token_id decoder_start_token_id
    do_sample temperature top_p top_k repetition_penalty max_new_tokens min_length num_beams
    attention_dropout hidden_dropout resid_pdrop hidden_dropout_prob
    attention_probs_dropout_prob embd_pdrop attn_pdrop residual_dropout embedding_dropout
    """.split()
)
# Types that some older repositories name instead of the architecture.
_ARCHITECTURE = re.compile(r"(For\w+|LMHeadModel)$")
_CLASSIFIER = "ForSequenceClassification"


def supported() -> str:
    """Returns the supported architectures as text for messages: those of one ending together."""
    found: dict[str, list[str]] = {}
    for name in sorted(FAMILIES):
        stem = _ARCHITECTURE.sub("", name)
        found.setdefault(name.removeprefix(stem), []).append(stem)
    found = {end: stems for end, stems in found.items() if end != _CLASSIFIER}
    return "; ".join(
        [f"{', '.join(sorted(stems))} ({end})" for end, stems in found.items()]
        + [f"classifiers of these ({_CLASSIFIER})"]
    )


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Translates the content of a Hugging Face config.json.

    Raises:
      UserError: unsupported architecture, a field we do not know, or a value we do not handle.

    >>> read_config({"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    ...              "num_attention_heads": 4}).head_dim
    16
    """
    name = _architecture(hf)
    family = FAMILIES[name]
    _refuse_unknown(hf, family)
    # null stands for the default, but a null window is no window (Mistral 0.2 and later), and a
    # null softcap no softcap.
    given = {field: value for field, value in hf.items() if value is not None or field in _NULLABLE}
    fields = {field: given.get(field, default) for field, default in family.fields.items()}
    read: dict[str, Any] = {
        option: value(fields) if callable(value) else value
        for option, value in family.config.items()
    }
    if read.get("rotary_dim") != 0:
        read = {**read_rope(fields, read["head_dim"]), **read}
    for activation in (read["activation"], read.get("head_activation")):
        if activation is not None and activation not in ACTIVATIONS:
            raise UserError(
                f"config.json: activation {activation!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}."
            )
    return ModelConfig(family=name, **read)


_NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "q_lora_rank")


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return name
    if not names and "model_type" in hf:
        for name in FAMILIES:
            if _ARCHITECTURE.sub("", name).lower() == str(hf["model_type"]).replace("_", ""):
                return name
        names = [f"of model_type {hf['model_type']}"]
    got = ", ".join(map(str, names)) or "none"
    raise UserError(f"config.json: architecture {got} is not supported; supported: {supported()}.")


def _refuse_unknown(hf: Mapping[str, Any], family: Family) -> None:
    expected = {**_EXPECTED, **family.expected}
    for name, value in hf.items():
        known = name in family.fields or name in _IGNORED or name in family.ignored
        if known and name not in family.expected:
            continue
        if name.startswith("_") or value is None or value in expected.get(name, ()):
            continue
        if name in expected:
            wanted = " or ".join(repr(option) for option in expected[name])
            raise UserError(f"config.json: {name}: {value!r} is not supported; expected {wanted}.")
        if value is False:
            continue
        raise UserError(
            f"config.json: {name}: {value!r} is a field jaxlora does not know, so the model might "
            f"differ from its reference.{did_you_mean(name, family.fields)} Architectures "
            f"supported: {supported()}."
        )
