"""The train step: how a batch is cut does not matter, and nothing frozen or not finite gets in."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import lora
from jaxlora.core.tree import flatten, unflatten
from jaxlora.data.batches import Batches
from jaxlora.data.table import TokenTable
from jaxlora.lora import LoraConfig, match
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe, init_params
from jaxlora.models.transformer import Transformer
from jaxlora.ops.quantize import quantize
from jaxlora.optim.optimizers import make_optimizer
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rules import Placement
from jaxlora.training import step as steps
from jaxlora.training.state import init_optimizer
from jaxlora.training.step import make_eval_step, make_train_step

CFG = ModelConfig(
    vocab_size=61,
    embed_dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    init_std=0.2,
)
SPECS = describe(CFG)
LINEAR = [path for path, spec in SPECS.items() if spec.kind == "linear"]
UNEVEN = 2  # seed of a batch whose parts differ in trained tokens


@dataclasses.dataclass
class Setup:
    """A step with its state; `train` returns the metrics and keeps the new state."""

    step: object
    evaluate: object
    trainable: dict
    opt_state: object
    frozen: dict

    def train(self, batch, number=0):
        batch = jax.tree.map(jnp.asarray, batch)
        self.trainable, self.opt_state, metrics = self.step(
            self.trainable, self.opt_state, self.frozen, batch, jnp.int32(number)
        )
        return {name: float(value) for name, value in metrics.items()}

    def loss(self, batch):
        loss_sum, tokens, _ = self.evaluate(self.trainable, self.frozen, batch)
        return float(loss_sum), float(tokens)


def make(method="lora", *, dropout=0.0, optimizer="sgd"):
    """Returns a setup in its first state; equal ones share their compiled steps."""
    step, evaluate, host, shardings = compiled(method, dropout, optimizer)
    return Setup(step, evaluate, *jax.tree.map(jax.device_put, host, shardings))


@functools.cache
def compiled(method, dropout, optimizer):
    placement = Placement(make_mesh(None, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    leaves = flatten(init_params(CFG, jax.random.key(0), jnp.float32))
    targets, adapter = {}, {}
    if method != "full":
        config = LoraConfig(r=4, alpha=8, dropout=dropout)
        targets = match({path: SPECS[path].modules() for path in LINEAR}, config, LINEAR)
        adapter = lora.init(unflatten(leaves), targets, jax.random.key(1))
        for pair in adapter.values():  # B = 0 would hide A, and dropout
            pair["b"] = 0.1 * rng.standard_normal(pair["b"].shape).astype(np.float32)
        adapter = {
            path: placement.adapter(pair, SPECS[path].axes, stacked=True)
            for path, pair in adapter.items()
        }
    if method == "int4":
        for path in LINEAR:
            layers = [quantize(np.asarray(layer), "int4") for layer in leaves[path]]
            leaves[path] = jax.tree.map(lambda *parts: np.stack(parts), *layers)
    leaves = {
        path: placement.weight(leaf, SPECS[path].axes, stacked=SPECS[path].layers is not None)
        for path, leaf in leaves.items()
    }
    full = method == "full"
    trainable = {"params": leaves if full else {}, "adapter": adapter}
    every = jax.tree.map(lambda leaf: True, trainable)
    tx = make_optimizer(
        optimizer, lambda step: 0.1, decayed=every, matrices=every, max_grad_norm=None
    )
    opt_state = init_optimizer(tx, trainable, placement)
    transformer, like = Transformer(CFG), (trainable, opt_state)
    step = make_train_step(transformer, targets, tx, jax.random.key(3), like)
    state = (trainable, opt_state, {} if full else leaves)
    return (
        step,
        make_eval_step(transformer, targets),
        arrays(state),
        jax.tree.map(lambda leaf: leaf.sharding, state),
    )


@pytest.fixture(scope="module")
def table():
    """24 examples of 3 to 24 tokens with uneven, broken masks."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(24):
        length = int(rng.integers(3, 25))
        trained = (rng.random(length) < rng.random() ** 2).astype(np.uint8)
        trained[0], trained[-1] = 0, 1
        examples.append((rng.integers(1, CFG.vocab_size, length), trained))
    return TokenTable.of(examples)


def batches_of(table, rows, accumulation=1, **options):
    defaults = {"sequence_len": 32, "seed": 5, "pad": True}
    return Batches(table, rows=rows, accumulation=accumulation, **{**defaults, **options})


def arrays(tree):
    return jax.tree.map(np.array, tree)


def largest_difference(left, right):
    differences = jax.tree.map(lambda x, y: np.abs(np.subtract(x, y)).max(), left, right)
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize(
    ("method", "cuts"), [("lora", ((1, 8), (2, 4), (4, 2))), ("full", ((1, 8), (4, 2)))]
)
def test_a_batch_can_be_cut_into_micro_batches_in_any_way(table, method, cuts):
    outcomes = {}
    for accumulation, rows in cuts:
        batch = batches_of(table, rows, accumulation, seed=UNEVEN).batch(0)
        tokens = batch["weights"].sum((1, 2))
        # With as many trained tokens in every part, a mean of means would pass too.
        assert accumulation == 1 or np.ptp(tokens) > 0.1 * tokens.mean()
        setup = make(method)
        metrics = setup.train(batch)
        outcomes[accumulation] = metrics, arrays(setup.trainable)
    (metrics, state) = outcomes.pop(1)
    for other_metrics, other_state in outcomes.values():
        for name in metrics:
            assert other_metrics[name] == pytest.approx(metrics[name], rel=2e-6), name
        # float32 sums in another order; the weights are of order 1, the updates of order 0.1.
        assert largest_difference(state, other_state) < 2e-6


def test_packing_changes_no_loss(table):
    setup = make()
    totals = []
    for packing in (False, True):
        batches = batches_of(table, 2, packing=packing)
        every = [setup.loss(batches.batch(step)) for step in range(batches.steps_per_epoch)]
        totals.append(np.sum(every, axis=0))
    (unpacked, tokens), (packed, tokens_packed) = totals
    assert tokens == tokens_packed == table.trained[:].sum()
    assert packed == pytest.approx(unpacked, rel=1e-6)  # float32 sums in another order


def test_the_loss_is_the_mean_over_trained_tokens(table):
    setup = make()
    batch = batches_of(table, 8).batch(0)
    loss_sum, tokens = setup.loss(batch)
    metrics = setup.train(batch)
    assert tokens == batch["weights"].sum()
    assert metrics["trained_tokens"] == tokens
    assert metrics["loss"] == pytest.approx(loss_sum / tokens, rel=1e-6)


def test_the_state_is_donated_and_the_base_is_not(table):
    setup = make(optimizer="adamw")
    gone = jax.tree.leaves((setup.trainable, setup.opt_state))
    setup.train(batches_of(table, 8).batch(0))
    assert all(leaf.is_deleted() for leaf in gone)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(setup.frozen))


def test_the_second_step_does_not_compile(table):
    setup = make(optimizer="adamw")
    before = setup.step._cache_size()  # equal setups share the step
    batches = batches_of(table, 8)
    for number in range(3):
        setup.train(batches.batch(number), number)
    assert setup.step._cache_size() == max(before, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(table, bad):
    setup = make(optimizer="adamw")
    batch = batches_of(table, 8).batch(0)
    setup.train(batch)
    before = arrays((setup.trainable, setup.opt_state))
    frozen = setup.frozen
    setup.frozen = {**frozen, "norm/scale": frozen["norm/scale"].at[0].set(bad)}
    assert not np.isfinite(setup.train(batch, 1)["loss"])
    after = arrays((setup.trainable, setup.opt_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    setup.frozen = frozen
    assert np.isfinite(setup.train(batch, 1)["loss"])
    assert largest_difference(before[0], arrays(setup.trainable)) > 0


@pytest.mark.parametrize("method", ["lora", "int4"])
def test_what_is_frozen_keeps_every_bit(table, method):
    setup = make(method)
    before = arrays((setup.frozen, setup.trainable))
    batches = batches_of(table, 8)
    for number in range(3):
        setup.train(batches.batch(number), number)
    for was, now in zip(
        jax.tree.leaves(before[0]), jax.tree.leaves(arrays(setup.frozen)), strict=True
    ):
        assert was.tobytes() == now.tobytes()
    for was, now in zip(
        jax.tree.leaves(before[1]), jax.tree.leaves(arrays(setup.trainable)), strict=True
    ):
        assert not np.array_equal(was, now), "an adapter array was not trained"


def test_dropout_differs_between_steps_and_micro_batches_and_is_off_in_evaluation(table):
    one = batches_of(table, 8).batch(0)
    twice = {name: np.concatenate([array, array]) for name, array in one.items()}

    def loss_of(batch, number):
        return make(dropout=0.5).train(batch, number)["loss"]

    first = loss_of(one, 0)
    assert first == loss_of(one, 0)
    assert first != loss_of(one, 1)
    assert first != loss_of(twice, 0)
    dropping, plain = make(dropout=0.5), make(dropout=0.0)
    assert dropping.loss(one) == plain.loss(one)


def test_chunks_of_logits_are_those_of_the_devices(monkeypatch):
    asked = []

    def tokens_per_chunk(vocab, platform):
        asked.append(platform)
        return 8

    monkeypatch.setattr(steps, "tokens_per_chunk", tokens_per_chunk)
    sharding = SimpleNamespace(device_set=[SimpleNamespace(platform="tpu")], mesh=None)
    placed = {"adapter": {}, "params": SimpleNamespace(sharding=sharding)}
    for like in (None, placed):
        make_eval_step(Transformer(CFG), {}, like)
    assert asked == ["cpu", "tpu"]
