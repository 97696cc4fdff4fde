"""Logits of the transformer against transformers, family by family, in float32."""

import dataclasses

import numpy as np
import pytest

from jaxlora.models.config import ModelConfig
from jaxlora.ops.rope import RopeScaling

pytest.importorskip("torch")

# float32, 3 layers, logits of standard deviation about 1: rounding alone gives some 5e-6.
TOLERANCE = 2e-5

# Odd sizes throughout: nothing may depend on a dimension being even or a power of two, except
# head_dim, which rotary embeddings halve.
SIZES = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}
# In 100 tokens the first three of 5 channel pairs turn 15.9, 1.15 and 0.08 times: one above
# llama3's borders of 1 and 4, one between and one below.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}
CASES = {
    "llama 1 and 2 (MHA)": ("Llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama 3 (GQA)": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama 3.2 (tied)": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "linear scaling": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, explicit head_dim": ("Llama", {"head_dim": 14, "num_key_value_heads": 1}),
    "mistral 0.1 (window)": ("Mistral", {"sliding_window": 7, "head_dim": 12}),
    "mistral 0.3": (
        "Mistral",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}


def tokens_of(seed, length=37):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, length))


def assert_equal_logits(pair, seed):
    tokens = tokens_of(seed)
    wanted = pair.torch_logits(tokens)
    # Outside this range the comparison is blind or its tolerance means something else.
    assert 0.5 <= wanted.std() <= 3, wanted.std()
    difference = np.abs(pair.logits(tokens) - wanted).max()
    assert difference <= TOLERANCE, difference


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(make_pair, case, seed):
    family, fields = CASES[case]
    assert_equal_logits(make_pair(family, seed, **{**SIZES, **fields}), seed)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_on_more_seeds(make_pair, case, seed):
    family, fields = CASES[case]
    assert_equal_logits(make_pair(family, seed, **{**SIZES, **fields}), seed)


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
                "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
            },
            LLAMA3_ROPE,
        ),
    ],
    ids=["theta", "linear", "llama3"],
)
def test_logits_equal_transformers_for_fields_as_written_before_version_5(make_pair, old, new):
    config_json = {"architectures": ["LlamaForCausalLM"], **SIZES, **old}
    pair = make_pair("Llama", 0, config_json, **SIZES, rope_parameters=new)
    assert_equal_logits(pair, 0)


def test_llama3_scaling_without_an_original_context_uses_the_context(make_pair):
    rope = {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}
    sizes = SIZES | {"max_position_embeddings": 100}
    with_default = {**rope, "original_max_position_embeddings": 100}
    config_json = {"architectures": ["LlamaForCausalLM"], **sizes, "rope_parameters": rope}
    pair = make_pair("Llama", 0, config_json, **sizes, rope_parameters=with_default)
    assert_equal_logits(pair, 0)


SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 100)
# What must be noticed when it is wrong: heads are cut differently from the same matrices.
MUTATIONS = {
    "llama 3.1": [
        {"norm_eps": 1e-4},
        {"rope_theta": 400000.0},
        {"rope_scaling": None},
        {"rope_scaling": RopeScaling("linear", 8.0)},
        {"rope_scaling": dataclasses.replace(SCALING, factor=7.0)},
        {"rope_scaling": dataclasses.replace(SCALING, low_freq_factor=0.8)},
        {"rope_scaling": dataclasses.replace(SCALING, high_freq_factor=3.0)},
        {"rope_scaling": dataclasses.replace(SCALING, original_context=64)},
        {"num_heads": 30, "num_kv_heads": 15, "head_dim": 2},
        {"sliding_window": 36},
    ],
    "mistral 0.1 (window)": [
        {"sliding_window": 6},
        {"sliding_window": 8},
        {"sliding_window": None},
        {"num_heads": 12, "num_kv_heads": 6, "head_dim": 6},
    ],
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_wrong_config_field_is_noticed(make_pair, case):
    family, fields = CASES[case]
    pair = make_pair(family, 0, **{**SIZES, **fields})
    tokens = tokens_of(0)
    wanted = pair.torch_logits(tokens)
    for change in MUTATIONS[case]:
        wrong = dataclasses.replace(pair.cfg, **change)
        assert wrong != pair.cfg, change
        difference = np.abs(pair.logits(tokens, wrong) - wanted).max()
        assert difference > 10 * TOLERANCE, (change, difference)


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias", "tie_embedding"])
def test_a_wrong_config_field_that_changes_the_tree_does_not_run_equal(make_pair, field):
    pair = make_pair("Llama", 0, **SIZES, attention_bias=True, mlp_bias=True)
    wrong = dataclasses.replace(pair.cfg, **{field: not getattr(pair.cfg, field)})
    tokens = tokens_of(0)
    try:
        difference = np.abs(pair.logits(tokens, wrong) - pair.torch_logits(tokens)).max()
    except (ValueError, KeyError, AttributeError):
        return
    assert difference > 10 * TOLERANCE


def test_every_config_field_is_mutated_or_is_a_shape():
    mutated = {field for changes in MUTATIONS.values() for change in changes for field in change}
    mutated |= {"attention_bias", "mlp_bias", "tie_embedding"}
    # Shapes must equal those of the weights; the last two are not used by a forward pass.
    others = {"vocab_size", "embed_dim", "mlp_dim", "num_layers", "max_context", "init_std"}
    assert mutated | others == {field.name for field in dataclasses.fields(ModelConfig)}
