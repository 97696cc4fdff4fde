"""Rotary positions as config.json tells them, in every spelling since LLaMA 1."""

import math
from collections.abc import Mapping
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.models.families.row import Fields
from jaxlora.ops.rope import RopeScaling

# The fields that each scaling needs.
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
_THETAS = ("rope_theta", "rotary_emb_base", "global_rope_theta")
_LOCAL_THETAS = ("rope_local_base_freq", "local_rope_theta")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_rope(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Returns `ModelConfig`'s rotary fields.

    transformers 5 writes one ``rope_parameters``, by layer type where types differ; earlier files
    have ``rope_theta``, ``rope_scaling`` and a fraction of the channels apart.

    Raises:
      UserError: an unknown scaling, or one without its numbers.
    """
    given = fields.get("rope_parameters") or {}
    by_type = {name: given[name] for name in (_FULL, _SLIDING) if name in given}
    rope = dict(by_type.get(_FULL) or given or fields.get("rope_scaling") or {})
    theta = next((fields[name] for name in _THETAS if name in fields), 10000.0)
    rope.setdefault("rope_theta", theta)
    part = fields.get("partial_rotary_factor", fields.get("rotary_pct", 1.0))
    part = rope.get("partial_rotary_factor", part)
    read: dict[str, Any] = {
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": _scaling(rope, fields),
    }
    if part != 1.0:
        read["rotary_dim"] = int(head_dim * part)
    if any(name in fields for name in _LOCAL_THETAS):
        local_theta = next(fields[name] for name in _LOCAL_THETAS if name in fields) or theta
        local = by_type.get(_SLIDING, {})
        if local.get("rope_type", "default") != "default":
            raise UserError(
                "config.json: rope_parameters: a scaling of the sliding layers is not supported."
            )
        read["local_rope_theta"] = float(local.get("rope_theta", local_theta))
    return read


def softmax_gain(fields: Fields) -> float:
    """Returns what DeepSeek multiplies the attention scale by where YaRN stretches the context."""
    rope = fields["rope_parameters"] or fields["rope_scaling"] or {}
    kind, mscale = rope.get("rope_type", rope.get("type")), rope.get("mscale_all_dim") or 0.0
    if kind in (None, "default") or not mscale:
        return 1.0
    return yarn_gain(float(rope["factor"]), float(mscale)) ** 2


def _scaling(rope: Mapping[str, Any], fields: Fields) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return None
    # Phi-3's first files; longrope is what both mean.
    if "short_factor" in rope and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in _NEEDED:
        raise UserError(
            f"config.json: rope scaling {kind!r} is not supported; "
            f"supported: default, {', '.join(_NEEDED)}."
        )
    for name in _NEEDED[kind]:
        if name not in rope:
            raise UserError(f"config.json: rope scaling {kind!r} has no {name}; add it.")
    longest = fields["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or (
        fields.get("original_max_position_embeddings") or longest
    )
    factor = rope.get("factor")
    factor = longest / original if factor is None else float(factor)
    if kind == "dynamic":  # counts from the full context, whatever the file calls original
        original = longest
    return RopeScaling(
        kind,
        factor,
        float(rope.get("low_freq_factor") or 1.0),
        float(rope.get("high_freq_factor") or 4.0),
        int(original),
        float(rope.get("beta_fast") or 32.0),
        float(rope.get("beta_slow") or 1.0),
        bool(rope.get("truncate", True)),
        _attention_factor(kind, factor, rope, original),
        tuple(map(float, rope.get("short_factor") or ())),
        tuple(map(float, rope.get("long_factor") or ())),
    )


def _attention_factor(kind: str, factor: float, rope: Mapping[str, Any], original: int) -> float:
    if kind not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_gain(factor, rope["mscale"]) / yarn_gain(factor, rope["mscale_all_dim"])
    return yarn_gain(factor, 1.0)


def yarn_gain(factor: float, mscale: float) -> float:
    """Returns YaRN's correction of the softmax temperature (Peng et al. 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
