"""Config files as transformers wrote them before version 5, and numbers that are nearly right."""

import dataclasses

import numpy as np
import pytest
from family_cases import ODD_SIZES, SCALED_ROPE

from jaxlora.ops.rope import RopeScaling

pytest.importorskip("torch")

# float32, 3 layers, logits of standard deviation about 1: rounding alone gives some 5e-6.
TOLERANCE = 2e-5


def tokens_of(seed, length=37):
    return np.random.default_rng(seed).integers(0, ODD_SIZES["vocab_size"], (2, length))


def assert_equal_logits(pair, seed):
    tokens = tokens_of(seed)
    wanted = pair.torch_logits(tokens)
    # Outside this range the comparison is blind or its tolerance means something else.
    assert 0.5 <= wanted.std() <= 3, wanted.std()
    difference = np.abs(pair.logits(tokens) - wanted).max()
    assert difference <= TOLERANCE, difference


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 500000.0}, {"rope_type": "default", "rope_theta": 500000.0}),
        (
            {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0},
        ),
        (
            {
                "rope_theta": 500000.0,
                "rope_scaling": {k: v for k, v in SCALED_ROPE.items() if k != "rope_theta"},
            },
            SCALED_ROPE,
        ),
    ],
    ids=["theta", "linear", "llama3"],
)
def test_logits_equal_transformers_for_fields_as_written_before_version_5(make_pair, old, new):
    config_json = {"architectures": ["LlamaForCausalLM"], **ODD_SIZES, **old}
    pair = make_pair("Llama", 0, config_json, **ODD_SIZES, rope_parameters=new)
    assert_equal_logits(pair, 0)


def test_llama3_scaling_without_an_original_context_uses_the_context(make_pair):
    rope = {k: v for k, v in SCALED_ROPE.items() if not k.startswith("original")}
    sizes = ODD_SIZES | {"max_position_embeddings": 100}
    with_default = {**rope, "original_max_position_embeddings": 100}
    config_json = {"architectures": ["LlamaForCausalLM"], **sizes, "rope_parameters": rope}
    pair = make_pair("Llama", 0, config_json, **sizes, rope_parameters=with_default)
    assert_equal_logits(pair, 0)


SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 100)
LLAMA = ("Llama", {"rope_parameters": SCALED_ROPE})
MISTRAL = ("Mistral", {"sliding_window": 7, "head_dim": 12})
# Heads may be cut differently from the same matrices; a window may be wrong by one.
MUTATIONS = [
    (LLAMA, {"norm_eps": 1e-4}),
    (LLAMA, {"rope_theta": 400000.0}),
    (LLAMA, {"rope_scaling": RopeScaling("linear", 8.0)}),
    (LLAMA, {"rope_scaling": dataclasses.replace(SCALING, factor=7.0)}),
    (LLAMA, {"rope_scaling": dataclasses.replace(SCALING, low_freq_factor=0.8)}),
    (LLAMA, {"rope_scaling": dataclasses.replace(SCALING, high_freq_factor=3.0)}),
    (LLAMA, {"rope_scaling": dataclasses.replace(SCALING, original_context=64)}),
    (LLAMA, {"num_heads": 30, "num_kv_heads": 15, "head_dim": 2}),
    (LLAMA, {"sliding_window": 36}),
    (MISTRAL, {"sliding_window": 6}),
    (MISTRAL, {"sliding_window": 8}),
]


@pytest.mark.parametrize(("model", "change"), MUTATIONS, ids=str)
def test_a_slightly_wrong_number_is_noticed(make_pair, model, change):
    family, fields = model
    pair = make_pair(family, 0, **{**ODD_SIZES, **fields})
    tokens = tokens_of(0)
    wrong = dataclasses.replace(pair.cfg, **change)
    assert wrong != pair.cfg
    difference = np.abs(pair.logits(tokens, wrong) - pair.torch_logits(tokens)).max()
    assert difference > 10 * TOLERANCE
