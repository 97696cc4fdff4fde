"""The comparison with transformers notices every field and every name of every row."""

import jax
import numpy as np
import pytest
from family_cases import CASES
from mutations import mutants, renamings

from jaxlora.checkpoints.load import check_weights
from jaxlora.core.errors import UserError
from jaxlora.models.parameters import describe

pytest.importorskip("torch")

# A few of the kinds: windows, latent attention with experts, and renamed modules.
QUICK = ("SmolLM3ForCausalLM", "Olmo3ForCausalLM", "GPT2LMHeadModel")
TOKENS = np.random.default_rng(0).integers(3, 61, (1, 29))
# The comparison itself allows 2e-5.
NOTICED = 2e-4


def _families():
    slow = pytest.mark.oracle
    named = dict.fromkeys(case.family for case in CASES.values())
    return [name if name in QUICK else pytest.param(name, marks=slow) for name in named]


def _cases(family):
    return [case for case in CASES.values() if case.family == family]


def _tensors(specs):
    """All that loading goes by."""
    return {
        path: (spec.sources(), spec.tensor_shape, spec.transposed) for path, spec in specs.items()
    }


def _refused(folder, cfg) -> bool:
    """Whether the case's files cannot be the model's."""
    try:
        check_weights(folder, cfg)
    except (UserError, KeyError):  # KeyError: a module that the row has no name for
        return True
    return False


def _noticed(pair, folder, cfg, logits) -> bool:
    try:
        changed = _tensors(describe(cfg)) != _tensors(describe(pair.cfg))
        if changed and _refused(folder, cfg):
            return True
        got = pair.logits(TOKENS, cfg)
    except (KeyError, TypeError, ValueError, IndexError, AssertionError, ZeroDivisionError):
        return True
    return not np.abs(got - logits).max() < NOTICED


@pytest.mark.parametrize("family", _families())
def test_every_field_of_a_row_shows(make_case, tmp_path, family):
    tried, noticed = set(), set()
    with jax.disable_jit():
        for number, case in enumerate(_cases(family)):
            pair, folder = make_case(case), tmp_path / str(number)
            pair.torch_model.save_pretrained(folder)
            logits = pair.logits(TOKENS)
            for field, cfg in mutants(pair.cfg):
                tried.add(field)
                if field not in noticed and _noticed(pair, folder, cfg, logits):
                    noticed.add(field)
    assert tried - noticed == set()


@pytest.mark.parametrize("family", _families())
def test_every_name_of_a_row_shows(make_case, tmp_path, family):
    tried, noticed = set(), set()
    for number, case in enumerate(_cases(family)):
        pair, folder = make_case(case), tmp_path / str(number)
        pair.torch_model.save_pretrained(folder)
        right = describe(pair.cfg)
        assert not _lacks_module(pair.torch_model, right)
        for ours, cfg in renamings(pair.cfg):
            wrong = describe(cfg)
            if wrong == right:  # not a module of this case
                continue
            tried.add(ours)
            if _lacks_module(pair.torch_model, wrong) or _refused(folder, cfg):
                noticed.add(ours)
    assert tried - noticed == set()


def _lacks_module(model, specs) -> bool:
    """Whether adapters would refer to a module that transformers' model does not have."""
    modules = dict([*model.named_modules(), *model.named_parameters()])  # experts are parameters
    return any(path not in modules for spec in specs.values() for path in spec.modules())
