"""Fixtures: tiny transformers models beside the same weights as our tree."""

import pytest
from pairs import build_case, build_pair


@pytest.fixture(scope="session")
def make_case():
    """``make_case(case, seed, folder) -> Pair``, see `family_cases.Case`."""
    return lambda case, seed=0, folder=None: build_case(
        case.family, case.config, case.fields, seed, folder
    )


@pytest.fixture(scope="session")
def make_pair():
    """``make_pair(family, seed, **fields of the transformers config) -> Pair``."""
    return build_pair
