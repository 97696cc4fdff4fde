"""Adam's moments in 8 bits: the map, the blocks, and what bitsandbytes computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora.optim.blockwise import (
    MIN_SIZE,
    block_axis,
    dequantize,
    dynamic_map,
    quantize,
    scale_by_blockwise_adam,
)


def random(*shape, seed=0):
    # Over six decades, as second moments are.
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 0, shape)
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_the_nearest_number_of_their_map(signed):
    x = random(4, 600)
    x = x if signed else jnp.abs(x)
    moment = quantize(x, signed=signed)
    assert moment["codes"].shape == x.shape
    assert moment["codes"].dtype == jnp.uint8
    assert moment["scales"].shape == (4, 3)
    blocks = np.pad(np.asarray(x), ((0, 0), (0, 168))).reshape(4, 3, 256)
    scales = np.abs(blocks).max(-1)
    distance = np.abs(blocks[..., None] / scales[..., None, None] - dynamic_map(signed))
    nearest = distance.min(-1) * scales[..., None]
    read = np.pad(np.asarray(dequantize(moment, signed=signed)), ((0, 0), (0, 168)))
    error = np.abs(read.reshape(blocks.shape) - blocks)
    np.testing.assert_allclose(error, nearest, atol=1e-7 * scales.max())


@pytest.mark.parametrize("shape", [(3, 500, 16), (3, 16, 500), (700,), (2, 256, 256)])
def test_blocks_run_along_the_longer_axis_of_any_shape(shape):
    x = random(*shape)
    moment = quantize(x, signed=True)
    axis = block_axis(shape)
    assert moment["scales"].shape[axis] == -(-shape[axis] // 256)
    # Where numbers lie 1 % of the scale apart, none is further off than half of that.
    error = jnp.abs(dequantize(moment, signed=True) - x)
    assert float(jnp.max(error)) <= 0.008 * float(jnp.max(jnp.abs(x)))


def test_a_block_of_zeros_stays_zero():
    moment = quantize(jnp.zeros((2, 300)), signed=False)
    assert float(jnp.max(jnp.abs(dequantize(moment, signed=False)))) == 0.0


def test_small_leaves_keep_float32_moments_and_are_plain_adam():
    params = {"bias": random(MIN_SIZE - 1)}
    ours, theirs = scale_by_blockwise_adam(0.9, 0.999, 1e-8), optax.scale_by_adam()
    states = [ours.init(params), theirs.init(params)]
    for seed in range(3):
        gradient = {"bias": random(MIN_SIZE - 1, seed=seed)}
        (a, states[0]), (b, states[1]) = (
            each.update(gradient, state) for each, state in zip((ours, theirs), states, strict=True)
        )
        # 1 - 0.999**n keeps five digits of float32.
        np.testing.assert_allclose(a["bias"], b["bias"], rtol=3e-5)


def test_states_take_two_bytes_a_number_and_a_scale_a_block():
    state = scale_by_blockwise_adam(0.9, 0.999, 1e-8).init({"a": jnp.zeros((4, 1024, 16))})
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.mu, state.nu)))
    assert size == 2 * (4 * 1024 * 16) * (1 + 4 / 256)


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed).numpy()
    # Theirs are rounded to float32 before they are scaled and after: two units.
    np.testing.assert_allclose(dynamic_map(signed), theirs, rtol=2 * 2**-23)


def test_steps_are_those_of_bitsandbytes():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    shape, steps = (64, 512), 20
    optimizer = scale_by_blockwise_adam(0.9, 0.999, 1e-8)
    ours = jnp.asarray(np.random.default_rng(9).standard_normal(shape), jnp.float32)
    theirs = torch.from_numpy(np.array(ours))
    codes = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)]
    maps = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]
    for code, each in zip(codes, maps, strict=True):
        code.fill_(int((each == 0).nonzero()[0]))
    scales = [torch.zeros(shape[0] * shape[1] // 256) for _ in range(2)]
    state = optimizer.init(ours)
    for number in range(1, steps + 1):
        gradient = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
        update, state = optimizer.update(jnp.asarray(gradient), state)
        ours = ours - 0.01 * update
        functional.optimizer_update_8bit_blockwise(
            "adam", torch.from_numpy(gradient), theirs, codes[0], codes[1], 0.9, 0.999, 0.0, 0.0,
            1e-8, number, 0.01, maps[0], maps[1], scales[0], scales[1], 0.0,
        )  # fmt: skip
    moved = np.abs(np.asarray(ours) - theirs.numpy())
    # Its CPU kernel rounds to 65536 steps before it looks a code up: 0.15 % of codes are neighbours
    # of ours, which shows where the second moment is small beside its block's.
    assert float(np.mean(moved)) < 2e-4 * steps
    assert float(np.quantile(moved, 0.99)) < 1e-2
