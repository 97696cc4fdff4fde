"""Every family against transformers, on tiny models with scaled random weights."""

import numpy as np
import pytest
from family_cases import CASES, CLASSIFIERS

from jaxlora.models.families import FAMILIES

pytest.importorskip("torch")


def test_every_family_has_a_case():
    assert {case.family for case in (CASES | CLASSIFIERS).values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(make_case, name):
    pair = make_case(CASES[name])
    tokens = np.random.default_rng(0).integers(3, 61, (2, 29))
    wanted = pair.torch_logits(tokens)
    assert 0.6 < wanted.std() < 1.8
    # float32 on both sides; a few layers of another order of summation.
    np.testing.assert_allclose(pair.logits(tokens), wanted, atol=2e-5)
