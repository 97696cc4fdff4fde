"""One wrong field of a row, or one wrong name, is noticed by the comparison of logits."""

import dataclasses

import jax
import numpy as np
import pytest
from family_cases import CASES
from subjects import TOKENS

from jaxlora.checkpoints.load import check_weights
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten, unflatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import FAMILIES
from jaxlora.models.parameters import describe

pytest.importorskip("torch")

# Ten times what the comparison with transformers allows.
NOTICED = 2e-4
FAST = ("Gemma2ForCausalLM", "GraniteForCausalLM")
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.default is not dataclasses.MISSING
}
# Fields whose change cannot be seen in logits.
UNSEEN = {
    "family": "a name; what it stands for is mutated field by field",
    "init_std": "fresh weights only",
    "renamed": "names, whose change is the second test's",
}
# How one of the family's config classes differs from LLaMA's and yet its case cannot tell.
_EXCUSED: dict[tuple[str, str], str] = {
    ("PhiForCausalLM", "qk_norm_bias"): "seen where qk_norm is set, which is another case",
}
NAMES = [pytest.param(f, marks=() if f in FAST else pytest.mark.oracle) for f in FAMILIES]


@pytest.fixture(scope="module")
def pairs_of(make_case, tmp_path_factory):
    """``pairs_of(family) -> [(pair, folder)]`` of all its cases."""

    def get(family):
        made = []
        for case in CASES.values():
            if case.family == family:
                folder = tmp_path_factory.mktemp("case")
                made.append((make_case(case, folder=folder), folder))
        return made

    return get


def is_noticed(pair, folder, wrong) -> bool:
    try:
        check_weights(folder, wrong)
    except (UserError, KeyError):  # other tensors, other shapes, or no name for one
        return True
    with jax.disable_jit():  # nothing is compiled anew for each of the changes
        got = pair.logits(TOKENS, wrong)
    return not np.abs(got - pair.torch_logits(TOKENS)).max() < NOTICED


@pytest.mark.parametrize("family", NAMES)
def test_a_field_with_llamas_value_is_noticed(pairs_of, family):
    unseen, seen = set(), set()
    for pair, folder in pairs_of(family):
        for name, default in DEFAULTS.items():
            if name in UNSEEN or name in seen or getattr(pair.cfg, name) == default:
                continue
            wrong = dataclasses.replace(pair.cfg, **{name: default})
            (seen if is_noticed(pair, folder, wrong) else unseen).add(name)
    survivors = {name for name in unseen - seen if (family, name) not in _EXCUSED}
    assert not survivors


@pytest.mark.parametrize("family", NAMES)
def test_two_leaves_exchanged_are_noticed(pairs_of, family):
    """Names that load the wrong tensor: any other fault of a name is a missing tensor."""
    for pair, _ in pairs_of(family)[:1]:
        specs, leaves = describe(pair.cfg), flatten(pair.params)
        wanted = pair.torch_logits(TOKENS)
        paths = sorted(specs)
        for number, one in enumerate(paths):
            for other in paths[number + 1 :]:
                if leaves[one].shape != leaves[other].shape:
                    continue
                swapped = unflatten(leaves | {one: leaves[other], other: leaves[one]})
                wrong = dataclasses.replace(pair, params=swapped)
                assert np.abs(wrong.logits(TOKENS) - wanted).max() > NOTICED, (one, other)
