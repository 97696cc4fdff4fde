"""Every optimizer goes downhill, AdamW is torch's, masks and clipping do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora.core.errors import UserError
from jaxlora.optim.optimizers import OPTIMIZERS, make_optimizer
from jaxlora.optim.schedules import make_schedule

RATES = {
    "adamw": 0.05,
    "adamw_8bit": 0.05,
    "adafactor": 0.05,
    "lion": 0.02,
    "sgd": 0.2,
    "muon": 0.05,
}


def make(name, tree, rate=0.1, *, decayed=None, matrices=None, **options):
    every = jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    return make_optimizer(
        name,
        lambda step: rate,
        decayed=every if decayed is None else decayed,
        matrices=every if matrices is None else matrices,
        **options,
    )


def one_update(name, params, gradient, **options):
    optimizer = make(name, params, **options)
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_the_table_below_has_every_optimizer():
    assert RATES.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill_on_a_quadratic(name):
    target = {"a": random(3, 6, 4), "b": random(5, seed=1)}
    params = jax.tree.map(jnp.zeros_like, target)
    optimizer = make(name, params, RATES[name])
    state = optimizer.init(params)

    def loss(params):
        squares = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), params, target)
        return sum(jax.tree.leaves(squares))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start = float(loss(params))
    for _ in range(150):
        params, state = step(params, state)
    assert float(loss(params)) < 0.1 * start


def test_adamw_equals_torch_step_for_step():
    torch = pytest.importorskip("torch")
    # Uneven gradients, decay on one leaf only, clipping active in some steps but not in all.
    start = {"w": np.asarray(random(7, 5)), "bias": np.asarray(random(5, seed=1))}
    gradients = [
        {
            name: (0.05 + 0.3 * (i % 3)) * np.asarray(random(*x.shape, seed=10 + i))
            for name, x in start.items()
        }
        for i in range(12)
    ]
    norms = [np.sqrt(sum((g**2).sum() for g in gradient.values())) for gradient in gradients]
    assert min(norms) < 1 < max(norms)
    schedule = make_schedule("cosine", 1e-2, total_steps=12, warmup_steps=3)
    ours = jax.tree.map(jnp.asarray, start)
    optimizer = make_optimizer(
        "adamw",
        schedule,
        decayed={"w": True, "bias": False},
        matrices={"w": True, "bias": False},
        weight_decay=0.3,
        betas=(0.8, 0.95),
        eps=1e-3,
        max_grad_norm=1.0,
    )
    state = optimizer.init(ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    groups = [
        {"params": [theirs["w"]], "weight_decay": 0.3},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-3)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = float(schedule(step))
        reference.step()
        for name, parameter in theirs.items():
            difference = np.abs(np.asarray(ours[name]) - parameter.detach().numpy()).max()
            assert difference <= 1e-6, (step, name, difference)  # float32, values of order 1


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_mean_in_bfloat16_is_the_only_moment_that_is_rounded(name):
    params = {"w": random(6, 4), "bias": random(5, seed=1)}

    def steps(**options):
        optimizer = make(name, params, 1e-2, **options)
        update, state, ours = jax.jit(optimizer.update), optimizer.init(params), params
        for seed in range(10):
            gradient = {key: random(*x.shape, seed=seed) for key, x in params.items()}
            updates, state = update(gradient, state, ours)
            ours = optax.apply_updates(ours, updates)
        return state, ours

    (plain, exact), (state, rounded) = steps(), steps(mu_dtype="bfloat16")
    dtypes = {str(x.dtype) for x in jax.tree.leaves(plain)}
    assert dtypes == {"float32", "int32"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim:
            of_mean = "mu" in {getattr(key, "name", "") for key in path}
            assert leaf.dtype == ("bfloat16" if of_mean else "float32"), path
    assert any(x.dtype == "bfloat16" for x in jax.tree.leaves(state))
    if name == "lion":  # only signs are applied: a rounding may turn a few of them
        return
    for key, values in exact.items():
        moved = jnp.abs(values - params[key]).max()
        error = jnp.abs(rounded[key] - values).max()
        assert 0 < error < 0.03 * moved  # bfloat16 keeps 8 bits, and roundings do not add up


def test_muon_orthogonalizes_each_layer_of_a_stack_by_itself():
    stack = random(3, 6, 4) * jnp.array([1e-2, 1.0, 50.0])[:, None, None]
    params, options = {"w": jnp.zeros_like(stack)}, {"max_grad_norm": None, "rate": 1.0}
    update = one_update("muon", params, {"w": stack}, **options)["w"]
    for layer in range(3):
        alone = one_update("muon", {"w": params["w"][layer]}, {"w": stack[layer]}, **options)["w"]
        np.testing.assert_allclose(update[layer], alone, atol=1e-5)  # float32 products
        values = np.linalg.svd(np.asarray(update[layer]), compute_uv=False)
        # Five Newton-Schulz steps bring singular values near 1, not to 1 (Jordan 2024: 0.7 to 1.2).
        assert values.max() / values.min() < 2, values
        spread = np.linalg.svd(np.asarray(stack[layer]), compute_uv=False)
        assert spread.max() / spread.min() > 2


def test_muon_gives_what_is_no_matrix_to_adam():
    params = {"w": jnp.zeros((4, 3)), "vector": jnp.zeros(3), "table": jnp.zeros((5, 4))}
    gradient = {"w": random(4, 3), "vector": random(3), "table": random(5, 4)}
    matrices = {"w": True, "vector": False, "table": False}
    updates = one_update("muon", params, gradient, matrices=matrices, max_grad_norm=None)
    # The first step of (Nesterov's) Adam is the sign of the gradient, Muon's is not.
    steps = {name: -updates[name] / np.sign(gradient[name]) for name in params}
    for name in ("vector", "table"):
        np.testing.assert_allclose(steps[name], steps["vector"][0], rtol=1e-4)
        assert steps[name].min() > 0.09
    assert np.ptp(steps["w"]) > 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_leaves_of_the_mask_decay(name):
    params = {"kept": jnp.ones((4, 3)), "decayed": jnp.ones((4, 3))}
    zero = jax.tree.map(jnp.zeros_like, params)
    mask = {"kept": False, "decayed": True}
    updates = one_update(name, params, zero, decayed=mask, weight_decay=0.2)
    assert np.all(np.asarray(updates["kept"]) == 0)
    np.testing.assert_allclose(updates["decayed"], -0.1 * 0.2, rtol=1e-6)  # rate x decay x 1


def test_a_gradient_beyond_the_norm_is_shortened_over_all_leaves_together():
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    gradient = {"a": 3 * jnp.ones(3), "b": 4 * jnp.ones((2, 2))}
    norm = float(optax.global_norm(gradient))
    clipped = one_update("sgd", params, gradient, rate=1.0, max_grad_norm=0.5)
    np.testing.assert_allclose(clipped["a"], -3 * 0.5 / norm, rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], -4 * 0.5 / norm, rtol=1e-6)
    short = one_update("sgd", params, gradient, rate=1.0, max_grad_norm=norm + 1)
    np.testing.assert_array_equal(short["b"], -gradient["b"])


@pytest.mark.parametrize("off", [None, 0.0])
def test_clipping_can_be_switched_off(off):
    params, gradient = {"a": jnp.zeros(3)}, {"a": 1e6 * jnp.ones(3)}
    update = one_update("sgd", params, gradient, rate=1.0, max_grad_norm=off)
    np.testing.assert_array_equal(update["a"], -gradient["a"])


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'adam' is unknown.*adamw"):
        make("adam", {"a": jnp.zeros(3)})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_leaf_with_a_multiple_of_the_rate_moves_by_that_multiple(name):
    params = {"a": random(6, 4), "b": random(4, 5, seed=1)}
    gradient = {"a": random(6, 4, seed=2), "b": random(4, 5, seed=3)}
    options = {"weight_decay": 0.1, "max_grad_norm": 0.5}
    plain = one_update(name, params, gradient, **options)
    scaled = one_update(name, params, gradient, **options, rates={"a": 1.0, "b": 16.0})
    np.testing.assert_array_equal(scaled["a"], plain["a"])
    np.testing.assert_array_equal(scaled["b"], 16 * plain["b"])  # a power of two: exact
