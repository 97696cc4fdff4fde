"""How an adapter starts, against PEFT: products, residuals, and LoftQ's alternation."""

import inspect

import jax
import numpy as np
import pytest

from jaxlora.lora.initializers import random_pair, split
from jaxlora.ops.quantize import dequantize, quantize

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

IN, OUT, RANK = 64, 48, 5


def weight():
    return np.random.default_rng(0).standard_normal((IN, OUT)).astype(np.float32)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT, bias=False)
        self.layer.weight.data = torch.from_numpy(np.ascontiguousarray(weight().T))


def of_peft(init, alpha):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=alpha, target_modules=["layer"], init_lora_weights=init
    )
    layer = peft.get_peft_model(Model(), config).base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return [x.detach().numpy().T for x in (layer.base_layer.weight, a, b)]


@pytest.mark.parametrize("alpha", [5, 12])
def test_pissa_of_the_exact_svd_equals_peft(alpha):
    base, a, b = of_peft("pissa", alpha)
    ours, (our_a, our_b) = split("pissa", weight(), RANK, alpha / RANK, lambda m: m, None)
    # Signs of singular vectors are LAPACK's; float32 SVDs of values up to 15.
    np.testing.assert_allclose(our_a @ our_b, a @ b, atol=2e-5)
    np.testing.assert_allclose(ours, base, atol=2e-5)
    np.testing.assert_allclose(np.abs(our_a), np.abs(a), atol=1e-4)
    assert np.abs(base - weight()).max() > 0.1


@pytest.mark.parametrize("alpha", [5, 12])
def test_olora_equals_peft(alpha):
    base, a, b = of_peft("olora", alpha)
    ours, (our_a, our_b) = split("olora", weight(), RANK, alpha / RANK, lambda m: m, None)
    np.testing.assert_allclose(our_a, a, atol=1e-5)  # Householder QR in float32 on both sides
    np.testing.assert_allclose(our_b, b, atol=1e-5)
    np.testing.assert_allclose(ours, base, atol=1e-5)


def test_randomized_pissa_is_no_further_from_the_weight_than_that_of_peft():
    torch.manual_seed(0)
    base, _, _ = of_peft("pissa_niter_2", RANK)
    rest, _ = split("pissa_niter_2", weight(), RANK, 1.0, lambda m: m, jax.random.key(0))
    assert np.linalg.norm(rest) <= np.linalg.norm(base) * 1.001


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_equals_peft(monkeypatch, rounds):
    pytest.importorskip("bitsandbytes")
    loftq = inspect.getmodule(peft.utils.loftq_utils.loftq_init)
    # PEFT's function asks for a GPU by name; the maths is the same.
    source = inspect.getsource(loftq.loftq_init).replace('else "cuda"', 'else "cpu"')
    monkeypatch.setattr(loftq, "is_xpu_available", lambda: False)
    names = dict(vars(loftq))
    exec(compile(source, "loftq", "exec"), names)
    theirs = torch.from_numpy(np.ascontiguousarray(weight().T))
    base, a, b = names["loftq_init"](theirs, num_bits=4, reduced_rank=RANK, num_iter=rounds)

    def store(matrix):
        return quantize(matrix, "nf4", double_quant=False)

    # At alpha = r: PEFT leaves the scale out, which makes base + scale A B miss the weight.
    leaf, (our_a, our_b) = split("loftq", weight(), RANK, 1.0, store, None, loftq_iter=rounds)
    # Later rounds quantize what is left of an SVD, which each side rounds in its own way.
    atol = 0 if rounds == 1 else 1e-6
    np.testing.assert_allclose(dequantize(leaf), base.numpy().T, atol=atol, rtol=0)
    np.testing.assert_allclose(our_a @ our_b, (b @ a).numpy().T, atol=1e-5)


def test_random_starts_have_the_spread_of_peft():
    torch.manual_seed(0)
    for init in (True, False, "gaussian"):
        _, a, b = of_peft(init, RANK)
        pairs = [random_pair(init, jax.random.key(seed), IN, OUT, (RANK,), ()) for seed in range(4)]
        for ours, theirs in zip(map(np.stack, zip(*pairs, strict=True)), (a, b), strict=True):
            # Of 240 to 1280 samples each: 5 % expected.
            np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.2)
            np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.3)
