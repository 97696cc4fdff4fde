"""Greedy decoding and sampling filters against transformers, token for token."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import ODD_SIZES, SCALED_ROPE
from torch_models import greedy

from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.generation.decoding import generate, stream
from jaxlora.generation.sampling import SamplingOptions, filtered, penalise
from jaxlora.generation.text import answer_text
from jaxlora.models.transformer import Transformer

torch = pytest.importorskip("torch")

TINYSTORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinystories-656k"
COUNT = 64
CASES = {
    "llama 3.2 (GQA, scaled rope, tied)": (
        "Llama",
        {"rope_parameters": SCALED_ROPE, "tie_word_embeddings": True},
    ),
    "mistral (window shorter than a prompt)": ("Mistral", {"sliding_window": 7, "head_dim": 12}),
}
PROMPTS = [
    np.random.default_rng(seed).integers(3, 131, length).tolist()
    for seed, length in enumerate((19, 1, 6, 33))
]


@pytest.mark.parametrize("case", CASES)
def test_greedy_batch_equals_transformers_token_for_token(make_pair, case):
    family, fields = CASES[case]
    pair = make_pair(family, 1, **{**ODD_SIZES, **fields})
    wanted = greedy(pair.torch_model, PROMPTS, COUNT)
    # A model that says one thing for ever, or the same to every prompt, would compare nothing.
    assert all(len(set(row)) > 10 for row in wanted)
    assert len({tuple(row[-20:]) for row in wanted}) == len(wanted)
    options = SamplingOptions(max_new_tokens=COUNT)
    assert generate(Transformer(pair.cfg), pair.params, PROMPTS, options) == wanted


def test_greedy_with_a_repetition_penalty_equals_transformers(make_pair):
    pair = make_pair("Llama", 2, **ODD_SIZES)
    # One row: transformers also penalises the tokens it pads with.
    [wanted] = greedy(pair.torch_model, PROMPTS[:1], COUNT, repetition_penalty=1.2)
    options = SamplingOptions(max_new_tokens=COUNT, repetition_penalty=1.2)
    assert list(stream(Transformer(pair.cfg), pair.params, PROMPTS[0], options)) == wanted


def test_tinystories_goes_on_as_in_transformers():
    if not TINYSTORIES.is_dir():
        pytest.skip("the tinystories model is not here")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINYSTORIES, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINYSTORIES)
    cfg, _ = read_model_config(TINYSTORIES)
    params = load_params(TINYSTORIES, cfg, dtype=jnp.float32)
    texts = ["Once upon a time", "The dog ran to the big tree and", "Tom"]
    prompts = [tokenizer(text).input_ids for text in texts]
    options = SamplingOptions(max_new_tokens=COUNT)
    answers = generate(Transformer(cfg), params, prompts, options)
    assert answers == greedy(model, prompts, COUNT)
    assert answer_text(tokenizer, prompts[0], answers[0]).startswith(
        ", a little girl named Lily lived in a small house with her mom, dad, and her dog"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.3},
    ],
    ids=str,
)
def test_filters_equal_transformers(options):
    from transformers.generation import logits_process as theirs

    options = SamplingOptions(**{"temperature": 1.0, **options})
    logits = np.random.default_rng(0).normal(scale=2, size=(6, 50)).astype(np.float32)
    steps = [theirs.TemperatureLogitsWarper(options.temperature)]
    steps += [theirs.TopKLogitsWarper(options.top_k)] if options.top_k else []
    steps += [theirs.TopPLogitsWarper(options.top_p), theirs.MinPLogitsWarper(options.min_p)]
    wanted = torch.tensor(logits)
    for step in steps:
        wanted = step(None, wanted)
    # One float32 division.
    np.testing.assert_allclose(filtered(jnp.asarray(logits), options), wanted, rtol=1e-6)


def test_the_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    rows = np.array([[1, 2, 2], [0, 19, 5], [7, 7, 7]])
    seen = np.zeros_like(logits, bool)
    np.put_along_axis(seen, rows, True, axis=1)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(rows), torch.tensor(logits))
    # One float32 division or product.
    np.testing.assert_allclose(penalise(jnp.asarray(logits), seen, 1.3), wanted, rtol=1e-6)
