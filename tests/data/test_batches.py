from collections import Counter

import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.batches import Batches
from jaxlora.data.table import TokenTable

NAMES = ("tokens", "targets", "weights", "positions", "segment_ids")


def table_of(count: int = 37, longest: int = 30) -> TokenTable:
    """Example i starts with the unique token 1000 + i; its other tokens and mask are random."""
    generator = np.random.default_rng(0)
    examples = []
    for i in range(count):
        length = int(generator.integers(2, longest + 1))
        tokens = [1000 + i, *generator.integers(1, 900, length - 1).tolist()]
        examples.append((tokens, [0, *generator.integers(0, 2, length - 1).tolist()]))
    return TokenTable.of(examples)


def segments(batch) -> list[dict[str, np.ndarray]]:
    flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in NAMES}
    found = []
    for row in range(len(flat["tokens"])):
        for segment in range(1, flat["segment_ids"][row].max() + 1):
            mask = flat["segment_ids"][row] == segment
            found.append({name: flat[name][row][mask] for name in NAMES})
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("rows", "accumulation"), [(1, 1), (3, 2), (64, 1)])
def test_each_example_is_seen_once_an_epoch(packing, rows, accumulation):
    table = table_of()
    batches = Batches(
        table, sequence_len=64, rows=rows, accumulation=accumulation, packing=packing, seed=5
    )
    for epoch in range(2):
        seen = Counter()
        for step in range(batches.steps_per_epoch):
            for segment in segments(batches.batch(epoch * batches.steps_per_epoch + step)):
                seen[int(segment["tokens"][0])] += 1
        assert seen == Counter({1000 + i: 1 for i in range(len(table))})


@pytest.mark.parametrize("packing", [True, False])
def test_segments_are_the_examples_with_shifted_targets(packing):
    table = table_of()
    batches = Batches(table, sequence_len=64, rows=2, packing=packing, seed=1)
    weights = 0.0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        weights += batch["weights"].sum()
        for segment in segments(batch):
            tokens, trained = table[int(segment["tokens"][0]) - 1000]
            assert np.array_equal(segment["tokens"], tokens)
            assert np.array_equal(segment["targets"], [*tokens[1:], 0])
            assert np.array_equal(segment["weights"], [*trained[1:], 0])
            assert np.array_equal(segment["positions"], np.arange(len(tokens)))
    assert weights == table.trained.sum()


def test_padding_has_no_weight_no_segment_and_the_pad_token():
    batch = Batches(table_of(), sequence_len=64, rows=64, packing=True, pad_id=7).batch(0)
    padding = batch["segment_ids"] == 0
    assert padding.any()
    assert (batch["tokens"][padding] == 7).all()
    assert not batch["weights"][padding].any()
    assert not batch["targets"][padding].any()


def test_batch_is_a_function_of_seed_and_step_alone():
    table = table_of()
    straight = Batches(table, sequence_len=64, rows=2, packing=True, seed=9)
    for step in range(3 * straight.steps_per_epoch):
        straight.batch(step)
    resumed = Batches(table, sequence_len=64, rows=2, packing=True, seed=9)
    for step in (2 * resumed.steps_per_epoch + 1, 0, resumed.steps_per_epoch):
        for name in NAMES:
            assert np.array_equal(resumed.batch(step)[name], straight.batch(step)[name])


def test_epochs_and_seeds_differ_in_order():
    table = table_of()
    batches = Batches(table, sequence_len=64, rows=2, packing=True, seed=9)
    other = Batches(table, sequence_len=64, rows=2, packing=True, seed=10)
    first = batches.batch(0)["tokens"]
    assert not np.array_equal(first, batches.batch(batches.steps_per_epoch)["tokens"])
    assert not np.array_equal(first, other.batch(0)["tokens"])


def test_unshuffled_batches_keep_the_order_of_the_table():
    batches = Batches(table_of(), sequence_len=64, rows=4, shuffle=False)
    assert batches.batch(1)["tokens"][0, :, 0].tolist() == [1004, 1005, 1006, 1007]


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"packing": True, "sequence_len": 300}, 300),
        ({"pad": True, "sequence_len": 300}, 300),
        ({"sequence_len": 300}, 128),
        ({"sequence_len": 100}, 100),
    ],
)
def test_length_is_one_shape_per_run(settings, length):
    table = TokenTable.of([(range(1, 71), [0] * 69 + [1]), ([1, 2], [0, 1])])
    batches = Batches(table, rows=3, accumulation=2, **settings)
    assert {array.shape for array in batches.batch(0).values()} == {(2, 3, length)}


def test_dtypes():
    batch = Batches(table_of(), sequence_len=64, rows=2).batch(0)
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), "int32"),
        "weights": "float32",
    }


def test_a_token_outside_the_vocabulary_is_refused():
    batches = Batches(table_of(), sequence_len=64, rows=64, vocab_size=1036)
    with pytest.raises(UserError, match="batch 0 holds token id 1036, outside the vocabulary"):
        batches.batch(0)


def test_a_table_of_longer_examples_is_refused():
    with pytest.raises(UserError, match="more than sequence_len 16"):
        Batches(table_of(), sequence_len=16, rows=1)


def poisoned(generator: np.random.Generator) -> TokenTable:
    """A table of one long example, one number of which cannot come from a tokenizer."""
    size = int(generator.integers(4, 60))
    tokens = generator.integers(0, 100, size).astype(np.int32)
    trained = np.ones(size, np.uint8)
    trained[0] = 0
    match generator.integers(3):
        case 0:
            wrong = [-1, -100, 100, 101, 2**31 - 1, -(2**31)]
            tokens[generator.integers(size)] = wrong[generator.integers(len(wrong))]
        case 1:
            trained[generator.integers(1, size)] = generator.integers(2, 256)
        case _:
            trained[:] = 0
    return TokenTable.of([(tokens, trained)])


def test_each_of_1000_poisoned_batches_is_refused_on_the_host():
    generator, caught = np.random.default_rng(0), 0
    for _ in range(1000):
        batches = Batches(poisoned(generator), sequence_len=64, rows=2, vocab_size=100)
        with pytest.raises(UserError, match=r"^batch 0 holds .*; the data cache is damaged"):
            batches.batch(0)
        caught += 1
    assert caught == 1000


def test_the_largest_token_of_the_vocabulary_is_fine():
    Batches(TokenTable.of([([0, 99], [0, 1])]), sequence_len=64, rows=1, vocab_size=100).batch(0)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_of_chosen_examples_holds_each_as_often_as_it_is_chosen(packing):
    table, chosen = table_of(), np.array([3, 3, 9, 0, 36, 3, 9])
    batches = Batches(table, sequence_len=64, rows=2, packing=packing, seed=1, examples=chosen)
    for epoch in range(2):
        seen = Counter()
        for step in range(batches.steps_per_epoch):
            for segment in segments(batches.batch(epoch * batches.steps_per_epoch + step)):
                seen[int(segment["tokens"][0]) - 1000] += 1
        assert seen == Counter(chosen.tolist())


def test_chosen_examples_keep_their_order_without_shuffling():
    chosen = np.array([5, 2, 5, 30])
    batches = Batches(table_of(), sequence_len=64, rows=4, shuffle=False, examples=chosen)
    assert batches.batch(0)["tokens"][0, :, 0].tolist() == [1005, 1002, 1005, 1030]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("rows", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_the_order_of_rows_depends_on_no_number_of_devices(packing, rows, accumulation):
    """Micro-batches of one device, two and four hold the rows of one of eight, in order."""
    shared = {"sequence_len": 64, "packing": packing, "seed": 5}
    eight = Batches(table_of(), rows=8, accumulation=1, **shared)
    fewer = Batches(table_of(), rows=rows, accumulation=accumulation, **shared)
    assert eight.steps_per_epoch == fewer.steps_per_epoch
    for step in range(2 * eight.steps_per_epoch):
        for name, array in fewer.batch(step).items():
            np.testing.assert_array_equal(array.reshape(8, -1), eight.batch(step)[name][0])


@pytest.mark.parametrize("packing", [True, False])
def test_a_process_reads_its_own_rows(packing, monkeypatch):
    batches = Batches(table_of(), sequence_len=64, rows=4, accumulation=2, packing=packing)
    whole = batches.batch(0)
    read, get = [], TokenTable.__getitem__
    monkeypatch.setattr(TokenTable, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    part = batches.batch(0, rows=(1, 2))
    for name, array in part.items():
        np.testing.assert_array_equal(array[:, 1:3], whole[name][:, 1:3])
        assert not array[:, [0, 3]].any()
    assert 0 < len(read) < len(batches.examples(0))
    assert batches.num_tokens(0) == np.count_nonzero(whole["segment_ids"])
