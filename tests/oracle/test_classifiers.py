"""Sequence classifiers against transformers: what the head reads, with padding on the right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CLASSIFIERS

from jaxlora.models.transformer import Transformer, bind

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle

LENGTHS = (29, 17, 8, 1)
# float32 on both sides; a few layers of another order of summation.
TOLERANCE = 2e-5


def padded(pad):
    tokens = np.random.default_rng(1).integers(3, 61, (len(LENGTHS), max(LENGTHS)))
    real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(real, tokens, pad), np.where(real, np.arange(max(LENGTHS)), 0), real.astype(int)


def labels_of(cfg, params, tokens, positions, segments):
    def run(params):
        model = bind(Transformer(cfg), params)
        return model.logits(model.pooled(model(tokens, positions, segments)[0], segments))

    return np.asarray(jax.jit(run)(params))


def reference(pair, tokens, segments):
    with torch.no_grad():
        mask = torch.tensor(segments)
        return pair.torch_model(torch.tensor(tokens), attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_padded_logits_equal_transformers(make_case, name):
    case = CLASSIFIERS[name]
    if "pad_token_id" not in case.fields:  # GPT-2, whose classifier needs one
        case = dataclasses.replace(case, fields={**case.fields, "pad_token_id": 0})
    pair = make_case(case)
    assert pair.cfg.num_labels == case.fields["num_labels"]
    tokens, positions, segments = padded(case.fields["pad_token_id"])
    wanted = reference(pair, tokens, segments)
    assert 0.3 < wanted.std() < 3
    got = labels_of(pair.cfg, pair.params, jnp.array(tokens), positions, segments)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma, labels", {"pooling": "mean"}),
        ("modernbert, mean", {"pooling": "first"}),
        ("bert, two labels", {"pooling": "last"}),
        ("bert, two labels", {"head_activation": "gelu"}),
    ],
)
def test_a_wrong_field_is_noticed(make_case, name, change):
    pair = make_case(CLASSIFIERS[name])
    tokens, positions, segments = padded(0)
    wanted = reference(pair, tokens, segments)
    wrong = dataclasses.replace(pair.cfg, **change)
    got = labels_of(wrong, pair.params, jnp.array(tokens), positions, segments)
    assert np.abs(got - wanted).max() > 10 * TOLERANCE
