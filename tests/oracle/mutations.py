"""What a wrong row of the table of families would say: one field or one name changed at a time."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxlora.models.config import ModelConfig
from jaxlora.models.families import FAMILIES

# Fields that no comparison of logits can see, and why.
UNSEEN = {
    "init_std": "fresh weights only; the cases load theirs",
    "max_context": "a limit on the data; no arithmetic reads it",
    "family": "the key of the row itself",
    "renamed": "names, mutated as names",
    "extra_layers": "tensors that are left out; test_deepseek_files has such files",
    "rope_scaling.kind": "with its numbers, as the whole of rope_scaling",
}
_NO_DENSE_MLP = {
    "mlp_dim": "every layer has experts",
    "mlp_bias": "every layer has experts",
}
_ONE_HEAD_EACH = {"num_kv_heads": "sizes the cache only; latent attention has no shared heads"}
UNSEEN_IN = {
    "Phi3ForCausalLM": {"rope_scaling.factor": "longrope divides by its own list"},
    "Gemma3ForCausalLM": {"rope_scaling.original_context": "linear has none"},
    "ModernBertForMaskedLM": {
        "rope_scaling.original_context": "linear has none",
        "pooling": "of the classifier that is made of it",
    },
    "MixtralForCausalLM": _NO_DENSE_MLP,
    "DeepseekV2ForCausalLM": _ONE_HEAD_EACH,
    "DeepseekV3ForCausalLM": _ONE_HEAD_EACH,
    "GptOssForCausalLM": {**_NO_DENSE_MLP, "activation": "clamped_swiglu in its place"},
}
# Another value for fields whose default says nothing when it is flipped.
_OTHERS: dict[str, Any] = {
    "head_activation": "relu",
    "logit_softcap": 3.0,
    "attention_softcap": 3.0,
    "attention_scale": 0.17,
    "sliding_window": 4,
    "sliding_layers": (0,),
    "nope_layers": (0,),
    "bare_layers": (1,),
    "local_rope_theta": 20.0,
    "rotary_dim": 2,
    "activation": "relu",
    "qkv_layout": "grouped",
    "qk_norm": "head",
    "norm": "layer",
    "norms": ("mlp_in",),
    "kind": "linear",
    "q_rank": 5,
}


def mutants(cfg: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yields ``(field, config)`` for every field that the case or its row sets: LLaMA's value in
    place of another, another in place of LLaMA's."""
    unseen = UNSEEN | UNSEEN_IN.get(cfg.family, {})
    for field, changed in _changed(cfg, set(FAMILIES[cfg.family].config)):
        if field not in unseen:
            yield field, changed


def _changed(part: Any, chosen: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(part):
        value, path = getattr(part, field.name), f"{prefix}{field.name}"
        if not (field.name in chosen or value != field.default):
            continue
        if dataclasses.is_dataclass(value):
            for inner, changed in _changed(value, set(), f"{path}."):
                yield inner, dataclasses.replace(part, **{field.name: changed})
            if field.default is dataclasses.MISSING:
                continue
        yield path, dataclasses.replace(part, **{field.name: _other(field, value)})


def _other(field: dataclasses.Field, value: Any) -> Any:
    if field.default not in (dataclasses.MISSING, value):
        return field.default
    if field.name in _OTHERS:
        return _OTHERS[field.name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[:-1]
    if field.name == "norm_eps":  # the default of most families
        return 1e-6
    assert isinstance(value, int | float), (field.name, value)
    return value + 1 if isinstance(value, int) else 1.5 * value


def renamings(cfg: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yields ``(our module, config)`` with a wrong name for every entry of the table of names."""
    names = {**FAMILIES[cfg.family].names, **dict(cfg.renamed)}
    for ours, theirs in names.items():
        wrong = theirs + "_" if isinstance(theirs, str) else tuple(f"{name}_" for name in theirs)
        yield ours, dataclasses.replace(cfg, renamed=(*cfg.renamed, (ours, wrong)))
