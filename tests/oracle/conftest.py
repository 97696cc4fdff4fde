"""Tiny transformers models with scaled random weights, beside the same weights as our tree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.tree import unflatten
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import read_config
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind


@dataclasses.dataclass
class Pair:
    """One model twice: as a torch module and as our config and parameter tree."""

    torch_model: Any
    cfg: ModelConfig
    params: dict

    def torch_logits(self, tokens) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.torch_model(torch.tensor(tokens)).logits.numpy()

    def logits(self, tokens, cfg: ModelConfig | None = None) -> np.ndarray:
        return np.asarray(run_decoder(cfg or self.cfg, self.params, jnp.asarray(tokens)))


@functools.partial(jax.jit, static_argnums=0)
def run_decoder(cfg, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    model = bind(Transformer(cfg), params)
    return model.logits(model(tokens, positions, jnp.ones_like(tokens))[0])


def scale_weights(model, seed: int) -> None:
    """Gives logits a standard deviation near 1 and attention peaks.

    With the initial weights of transformers attention is uniform and logits are near 0, so that a
    comparison sees next to nothing of positions, windows and scalings.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * 1.3 / parameter.shape[1] ** 0.5)
            else:  # norms keep their mean of 1, biases theirs of 0
                parameter.copy_(parameter.mean() + 0.2 * noise)


def convert(model, cfg: ModelConfig) -> dict:
    """Returns our parameter tree with the weights of a transformers model."""
    tensors = model.state_dict()
    leaves = {}
    for path, spec in describe(cfg).items():
        arrays = [tensors[name].numpy() for name in spec.hf_names()]
        arrays = [array.T if spec.transposed else array for array in arrays]
        leaves[path] = jnp.asarray(np.stack(arrays) if spec.layers else arrays[0])
        assert leaves[path].shape == spec.full_shape, path
    return unflatten(leaves)


def build_pair(family: str, seed: int = 0, config_json: dict | None = None, **fields) -> Pair:
    import transformers

    hf_config = getattr(transformers, f"{family}Config")(**fields)
    hf_config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(hf_config).eval().float()
    scale_weights(model, seed)
    written = hf_config.to_dict() | {"architectures": [type(model).__name__]}
    cfg = read_config(config_json or written)
    return Pair(model, cfg, convert(model, cfg))


@pytest.fixture(scope="session")
def make_pair():
    """``make_pair(family, seed, **fields of the transformers config) -> Pair``."""
    return build_pair
