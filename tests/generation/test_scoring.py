import itertools

import pytest

from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.scoring import Sample, exact_match

OPTIONS = SamplingOptions(max_new_tokens=8)


@pytest.fixture(scope="module")
def cats(tokenizer, parrot):
    """A model that continues "a" with " cat", and prompts and texts to score it with."""
    ids = tokenizer("a cat", add_special_tokens=False).input_ids
    chain = [*ids, tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain)
    return parrot(dict(itertools.pairwise(chain)), len(tokenizer)), ids[:1]


def test_only_equal_texts_count(cats, tokenizer):
    model, prompt = cats
    texts = [" cat", "cat\n", " ca", " cats", "Cat", ""]
    examples = [(prompt, text) for text in texts]
    score = exact_match(model.transformer, model.params, examples, tokenizer, OPTIONS, batch_size=4)
    assert [sample.correct for sample in score.samples] == [True, True, *[False] * 4]
    assert (score.correct, score.total, score.rate) == (2, 6, 2 / 6)
    assert score.samples[2] == Sample("a", " ca", " cat")


def test_an_answer_that_goes_on_is_wrong(cats, tokenizer):
    model, prompt = cats
    score = exact_match(
        model.transformer, model.params, [(prompt, " cat")], tokenizer, OPTIONS, eos_ids=()
    )
    assert score.correct == 0


def test_no_examples_score_zero(cats, tokenizer):
    model, _ = cats
    score = exact_match(model.transformer, model.params, [], tokenizer, OPTIONS)
    assert (score.rate, score.total) == (0.0, 0)
