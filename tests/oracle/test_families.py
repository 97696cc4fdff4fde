"""Every family against transformers and PEFT, column by column, on tiny scaled random weights.

`families_table` makes docs/families.md of what these tests measure.
"""

import copy
import warnings

import jax
import numpy as np
import pytest
from family_cases import CASES, CLASSIFIERS, FAST
from subjects import PREFIX, TOKENS, Subject, torch_logits
from torch_models import greedy

from jaxlora.core.tree import flatten
from jaxlora.generation.decoding import generate
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.models.families import FAMILIES
from jaxlora.models.transformer import Transformer

pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# float32 on both sides; a few layers of another order of summation, logits of standard deviation 1.
LOGITS = 2e-5
# float32 sums of some thousand terms in another order, relative to the gradient's size.
GRADIENTS = 1e-4
NEW_TOKENS = 32
PROMPTS = [
    np.random.default_rng(seed).integers(3, 61, length).tolist()
    for seed, length in enumerate((19, 2, 23, 7))
]

# One case of every family in the default run, the rest with `make oracle`.
_FIRST = {case.family: name for name, case in reversed(CASES.items())}
_SLOW = pytest.mark.oracle
ONE_OF_EACH = [pytest.param(name, marks=() if name in _FIRST.values() else _SLOW) for name in CASES]
A_FEW = [pytest.param(name, marks=() if name in FAST else _SLOW) for name in CASES]


def test_every_family_has_a_case():
    assert {case.family for case in (CASES | CLASSIFIERS).values()} == set(FAMILIES)
    assert set(FAST) <= set(CASES)


@pytest.fixture(scope="module")
def subject_of(make_case, tmp_path_factory):
    """``subject_of(name) -> Subject``, made once: the tests come case by case (their `scope`)."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made.clear()
            jax.clear_caches()  # a process that holds some thousand compiled programs crashes
            folder = tmp_path_factory.mktemp("subject") / "base"
            made[name] = Subject(make_case(CASES[name], folder=folder), folder)
        return made[name]

    return get


@pytest.fixture
def cell(request, record_property, subject_of):
    """Says which cell of the table a test is, skips where there is none; ``cell(figure)``."""
    name, column = request.node.callspec.params["name"], request.node.get_closest_marker("column")
    case, column = CASES[name], column.args[0]
    for key, value in (("case", name), ("family", case.family), ("column", column)):
        record_property(key, value)
    reason = case.inapplicable.get(column)
    if column == "generation" and not reason and not subject_of(name).cfg.causal:
        reason = "an encoder does not generate"
    if reason:
        record_property("inapplicable", reason)
        pytest.skip(reason)
    return lambda figure: record_property("figure", float(figure))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max())


def relative(ours: dict, wanted: dict) -> float:
    """The worst relative distance of two gradients, leaf by leaf."""
    ours, wanted = flatten(ours), flatten(wanted)
    assert ours.keys() == wanted.keys()
    sizes = {path: np.linalg.norm(leaf) for path, leaf in wanted.items()}
    assert min(sizes.values()) > 1e-5, sizes  # a gradient of nothing would compare nothing
    return max(np.linalg.norm(ours[path] - wanted[path]) / sizes[path] for path in wanted)


@pytest.mark.column("logits")
@pytest.mark.parametrize("name", ONE_OF_EACH, scope="module")
def test_logits_equal_transformers(cell, subject_of, name):
    pair = subject_of(name).pair
    wanted = pair.torch_logits(TOKENS)
    # Outside this range the comparison is blind or its tolerance means something else.
    assert 0.6 < wanted.std() < 1.8
    figure = difference(pair.logits(TOKENS), wanted)
    cell(figure)
    assert figure <= LOGITS


@pytest.mark.oracle
@pytest.mark.column("logits")
@pytest.mark.parametrize("name", CASES, scope="module")
def test_logits_equal_transformers_on_another_seed(cell, make_case, name):
    pair = make_case(CASES[name], 1)
    tokens = np.random.default_rng(1).integers(3, 61, TOKENS.shape)
    figure = difference(pair.logits(tokens), pair.torch_logits(tokens))
    cell(figure)
    assert figure <= LOGITS


@pytest.mark.column("generation")
@pytest.mark.parametrize("name", A_FEW, scope="module")
def test_greedy_tokens_with_the_cache_equal_transformers(cell, subject_of, name):
    subject = subject_of(name)
    wanted = greedy(subject.pair.torch_model, PROMPTS, NEW_TOKENS)
    # Tiny models soon repeat themselves; hence the comparison of logits below.
    assert len({token for row in wanted for token in row}) > 5
    options = SamplingOptions(max_new_tokens=NEW_TOKENS)
    assert generate(Transformer(subject.cfg), subject.params, PROMPTS, options) == wanted
    cell(0.0)


@pytest.mark.column("generation")
@pytest.mark.parametrize("name", A_FEW, scope="module")
def test_logits_of_token_after_token_through_the_cache_equal_transformers(cell, subject_of, name):
    subject = subject_of(name)
    figure = difference(subject.cached_logits(), subject.pair.torch_logits(TOKENS)[:, PREFIX:])
    cell(figure)
    assert figure <= LOGITS


@pytest.mark.column("LoRA gradients")
@pytest.mark.parametrize("name", A_FEW, scope="module")
def test_lora_gradients_equal_peft(cell, subject_of, name):
    subject = subject_of(name)
    loss, wanted = subject.peft_gradient()
    (ours, _), gradient = subject.evaluate(subject.loaded[0], subject.params)
    assert abs(float(ours) - loss) <= 1e-5 * loss
    figure = relative(gradient, wanted)
    cell(figure)
    assert figure <= GRADIENTS


@pytest.mark.column("PEFT round trip")
@pytest.mark.parametrize("name", A_FEW, scope="module")
def test_adapter_goes_to_peft_and_back_with_equal_logits(cell, subject_of, name):
    subject = subject_of(name)
    ours, wanted = subject.logits(subject.params), torch_logits(subject.peft)
    assert difference(wanted, subject.pair.torch_logits(TOKENS)) > 0.05
    assert subject.our_targets == subject.loaded[1]  # "all-linear" is the same to both
    base = copy.deepcopy(subject.pair.torch_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # and sets it
        again = peft.PeftModel.from_pretrained(base, subject.exported()).eval()
    figure = max(difference(ours, wanted), difference(ours, torch_logits(again)))
    cell(figure)
    assert figure <= LOGITS


@pytest.mark.column("merge")
@pytest.mark.parametrize("name", A_FEW, scope="module")
def test_merged_model_in_transformers_has_the_logits_of_base_and_adapter(cell, subject_of, name):
    subject = subject_of(name)
    merged = subject.load_in_transformers(subject.merged)
    figure = difference(subject.logits(subject.params), torch_logits(merged))
    cell(figure)
    assert figure <= LOGITS


def check_quantized(subject: Subject, format: str) -> float:
    leaves, plain, folder = subject.quantized(format)
    wanted = torch_logits(subject.load_in_transformers(folder))
    assert difference(wanted, subject.pair.torch_logits(TOKENS)) > 0.01  # it was quantized
    figure = difference(subject.logits(leaves, adapted=False), wanted)
    assert figure <= LOGITS
    adapter = subject.loaded[0]
    _, gradient = subject.evaluate(adapter, leaves)
    _, of_plain = subject.evaluate(adapter, plain)
    assert relative(gradient, of_plain) <= GRADIENTS
    return figure


@pytest.mark.column("nf4")
@pytest.mark.parametrize("name", A_FEW, scope="module")
def test_nf4_base_equals_its_dequantized_weights_in_transformers(cell, subject_of, name):
    cell(check_quantized(subject_of(name), "nf4"))


@pytest.mark.column("int4")
@pytest.mark.parametrize("name", A_FEW, scope="module")
def test_int4_base_equals_its_dequantized_weights_in_transformers(cell, subject_of, name):
    cell(check_quantized(subject_of(name), "int4"))
