import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.batches import Batches
from jaxlora.data.masking import Masking
from jaxlora.data.table import TokenTable

MASK, SPECIAL, VOCABULARY = 4, (0, 1, 2, 3, 4), 1000
MASKING = Masking(0.15, MASK, SPECIAL, VOCABULARY, seed=3)


def batch_of(rows=400, length=500, seed=0):
    tokens = np.random.default_rng(seed).integers(5, VOCABULARY, (1, rows, length)).astype(np.int32)
    tokens[..., 0], tokens[..., -20] = 2, 3
    segments = np.ones_like(tokens)
    segments[..., -19:], tokens[..., -19:] = 0, 0
    return {"tokens": tokens, "segment_ids": segments}


def assert_share(count, of, share):
    # Five standard deviations of a binomial count: wrong once in a million draws.
    assert abs(count - of * share) < 5 * (of * share * (1 - share)) ** 0.5, (count / of, share)


def test_rates_are_bert_s():
    before, after = batch_of(), MASKING(batch_of(), 0)
    chosen = after["weights"] == 1
    ordinary = (before["segment_ids"] > 0) & ~np.isin(before["tokens"], SPECIAL)
    assert_share(chosen.sum(), ordinary.sum(), 0.15)
    hidden = (after["tokens"] == MASK) & chosen
    assert_share(hidden.sum(), chosen.sum(), 0.8)
    # A random token is the old one once in a thousand.
    changed = (after["tokens"] != before["tokens"]) & chosen & ~hidden
    assert_share(changed.sum(), chosen.sum(), 0.1 * (1 - 1 / VOCABULARY))
    shown = after["tokens"][changed]
    assert shown.min() < 20
    assert shown.max() > VOCABULARY - 20


def test_only_chosen_tokens_change_and_special_ones_and_padding_never():
    before, after = batch_of(), MASKING(batch_of(), 5)
    chosen = after["weights"] == 1
    np.testing.assert_array_equal(after["tokens"][~chosen], before["tokens"][~chosen])
    np.testing.assert_array_equal(after["targets"][chosen], before["tokens"][chosen])
    assert (after["targets"][~chosen] == 0).all()
    assert not chosen[np.isin(before["tokens"], SPECIAL) | (before["segment_ids"] == 0)].any()


def test_a_mask_is_a_function_of_seed_and_step():
    first, again = MASKING(batch_of(), 7), MASKING(batch_of(), 7)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    other = Masking(0.15, MASK, SPECIAL, VOCABULARY, seed=4)
    for different in (MASKING(batch_of(), 8), other(batch_of(), 7)):
        assert (different["weights"] != first["weights"]).mean() > 0.1


@pytest.mark.parametrize("packing", [False, True])
def test_a_mask_does_not_depend_on_how_a_batch_is_cut(packing):
    rng = np.random.default_rng(0)
    examples = [[2, *rng.integers(5, 90, 20).tolist(), 3] for _ in range(30)]
    table = TokenTable.of([(tokens, [1] * len(tokens)) for tokens in examples])

    def batch(rows, accumulation):
        batches = Batches(
            table,
            sequence_len=64,
            rows=rows,
            accumulation=accumulation,
            packing=packing,
            masking=MASKING,
        )
        return {name: x.reshape(8, -1) for name, x in batches.batch(1).items()}

    whole, cut = batch(8, 1), batch(2, 4)
    assert whole["weights"].sum() > 0
    for name, array in whole.items():
        np.testing.assert_array_equal(array, cut[name], err_msg=name)


def test_rates_equal_transformers():
    torch = pytest.importorskip("torch")
    collator = pytest.importorskip("transformers").DataCollatorForLanguageModeling

    class Tokenizer:
        mask_token, mask_token_id, pad_token_id, pad_token = "m", MASK, 0, "p"

        def __len__(self):
            return VOCABULARY

        def convert_tokens_to_ids(self, token):
            return MASK

        def get_special_tokens_mask(self, tokens, already_has_special_tokens):
            return [int(token in SPECIAL) for token in tokens]

    torch.manual_seed(0)
    before, ours = batch_of(), MASKING(batch_of(), 0)
    tokens = torch.tensor(before["tokens"][0].astype(np.int64))
    theirs, labels = collator(Tokenizer(), mlm_probability=0.15).torch_mask_tokens(tokens.clone())
    chosen = (labels != -100).numpy()
    our_chosen = ours["weights"][0] == 1

    def rates(shown, chosen):
        changed = shown[chosen] != before["tokens"][0][chosen]
        masked = shown[chosen] == MASK
        return np.array([chosen.mean(), masked.mean(), (changed & ~masked).mean()])

    # Shares of some 30,000 tokens: a standard deviation is 0.0024 at most.
    np.testing.assert_allclose(
        rates(ours["tokens"][0], our_chosen), rates(theirs.numpy(), chosen), atol=0.015
    )


def test_a_tokenizer_without_a_mask_token_is_refused():
    class Tokenizer:
        mask_token_id = None

    with pytest.raises(UserError, match="mask token"):
        Masking.of(Tokenizer(), probability=0.15, seed=0)
