"""A model that says what it is told to, and the bundled tokenizer."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxlora
from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.data.tokenizer import load_tokenizer
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe, init_params
from jaxlora.models.transformer import Transformer

# init_std 0.5: logits of standard deviation above 1, so that no two of 61 are equal to rounding.
TINY = ModelConfig(
    vocab_size=61,
    embed_dim=24,
    mlp_dim=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_context=96,
    norm_eps=1e-5,
    rope_theta=100.0,
    init_std=0.5,
)


@dataclasses.dataclass(frozen=True)
class Model:
    transformer: Transformer
    params: Tree


@pytest.fixture(scope="session")
def random_model():
    """``random_model(**changes) -> Model`` with random weights."""

    def make(**changes) -> Model:
        cfg = dataclasses.replace(TINY, **changes)
        return Model(Transformer(cfg), init_params(cfg, jax.random.key(3), jnp.float32))

    return make


@pytest.fixture(scope="session")
def parrot():
    """``parrot(successors, vocab_size) -> Model`` that answers a token with its successor.

    Its layers add nothing to the stream, so the head sees the last token's one-hot embedding.
    """

    def make(successors: dict[int, int], vocab_size: int, **changes) -> Model:
        sizes = {"vocab_size": vocab_size, "embed_dim": vocab_size, "num_layers": 1}
        cfg = dataclasses.replace(TINY, **{**sizes, **changes})
        leaves = {path: jnp.zeros(spec.full_shape) for path, spec in describe(cfg).items()}
        leaves |= {path: leaf + 1 for path, leaf in leaves.items() if path.endswith("scale")}
        leaves["embed/embedding"] = jnp.eye(vocab_size)
        was, becomes = map(list, zip(*successors.items(), strict=True))
        head = leaves["lm_head/kernel"].at[jnp.array(was), jnp.array(becomes)].set(1.0)
        params = unflatten({**leaves, "lm_head/kernel": head})
        assert flatten(params).keys() == describe(cfg).keys()
        return Model(Transformer(cfg), params)

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled byte-level tokenizer with its chat template."""
    return load_tokenizer(Path(jaxlora.__file__).parent / "assets" / "tiny-llama")
