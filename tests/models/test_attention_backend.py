import dataclasses

import jax
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.models import attention_backend
from jaxlora.models.attention_backend import choose_backend
from jaxlora.models.config import ModelConfig
from jaxlora.ops.attention import Visibility

CFG = ModelConfig(
    vocab_size=8,
    embed_dim=16,
    mlp_dim=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_context=16,
    norm_eps=1e-5,
)
CAPPED = dataclasses.replace(CFG, attention_softcap=30.0)
SINKS = dataclasses.replace(CFG, attention_sinks=True)


@pytest.fixture(autouse=True)
def cudnn_is_here(monkeypatch):
    monkeypatch.setattr(attention_backend.attention_cudnn, "missing", lambda: None)


@pytest.mark.parametrize(
    ("cfg", "platform", "dtype", "name", "note"),
    [
        (CFG, "cpu", "float32", "chunked", ""),
        (CFG, "gpu", "bfloat16", "cudnn", ""),
        (CFG, "gpu", "float32", "chunked", "not float32"),
        (CAPPED, "gpu", "bfloat16", "chunked", "no softcap"),
        (CAPPED, "tpu", "bfloat16", "splash", ""),
        (SINKS, "tpu", "bfloat16", "chunked", "no sinks"),
    ],
)
def test_the_platform_and_the_model_decide(cfg, platform, dtype, name, note):
    backend = choose_backend(cfg, platform, dtype)
    assert backend.name == name
    assert note in backend.note
    assert bool(note) == bool(backend.note)


def test_what_is_asked_for_is_used():
    for name in ("reference", "chunked", "splash"):
        assert choose_backend(CFG, "tpu", "bfloat16", asked=name).name == name


@pytest.mark.parametrize(
    ("cfg", "platform", "asked", "words"),
    [
        (CFG, "cpu", "cudnn", "does not run on a cpu"),
        (CFG, "gpu", "splash", "does not run on a gpu"),
        (CAPPED, "gpu", "cudnn", "it has no softcap"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused(cfg, platform, asked, words):
    with pytest.raises(UserError, match=words):
        choose_backend(cfg, platform, "bfloat16", asked=asked)


@pytest.mark.parametrize(
    ("length", "asked", "chunked"),
    [(63, "auto", False), (64, "auto", True), (48, "chunked", True)],
)
def test_a_cpu_cuts_all_but_the_shortest_rows(length, asked, chunked):
    backend = choose_backend(CFG, "cpu", "float32", asked=asked)
    x = np.zeros((1, length, 2, 8), np.float32)
    positions = np.zeros((1, length), np.int32)
    seen = Visibility(positions, positions, positions, positions, in_place=True)
    jaxpr = str(jax.make_jaxpr(lambda q: backend.attend(q, q, q, seen))(x))
    assert ("custom_vjp" in jaxpr) == chunked
