"""Tiny transformers models with scaled random weights, beside the same weights as our tree."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.models.config import ModelConfig
from jaxlora.models.families.read import read_config
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
    segments = jnp.ones_like(tokens)
    return model.logits(model.pooled(model(tokens, positions, segments)[0], segments))


def scale_weights(model, seed: int) -> None:
    """Gives logits a standard deviation near 1 and attention peaks.

    With the initial weights of transformers attention is uniform and logits are near 0, so that a
    comparison sees next to nothing of positions, windows and scalings.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.copy_(noise * 1.3 / parameter.shape[1] ** 0.5)
            else:  # norms keep their mean of 1, biases theirs of 0
                parameter.copy_(parameter.mean() + 0.2 * noise)
        for name, buffer in model.named_buffers():
            if "correction" in name:  # zeros in a fresh model, where they would show nothing
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def convert(model, folder: Path) -> tuple[ModelConfig, dict]:
    """Returns our config and parameter tree of a transformers model, by way of its own files."""
    model.save_pretrained(folder)
    cfg, _ = read_model_config(folder)
    return cfg, load_params(folder, cfg, dtype=jnp.float32)


def build_pair(family: str, seed: int = 0, config_json: dict | None = None, **fields) -> Pair:
    """`config_json` replaces the config.json that transformers writes."""
    pair = build_case(f"{family}ForCausalLM", f"{family}Config", fields, seed)
    return dataclasses.replace(pair, cfg=read_config(config_json)) if config_json else pair


def build_case(
    family: str, config: str, fields: dict, seed: int = 0, folder: Path | None = None
) -> Pair:
    """Builds transformers' class `family` and loads what it saves, to `folder` if given."""
    import transformers

    hf_config = getattr(transformers, config)(**fields)
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"  # the grouped ones want sizes by 16 bytes
    model = getattr(transformers, family)(hf_config).eval().float()
    scale_weights(model, seed)
    with tempfile.TemporaryDirectory() as temporary:
        cfg, params = convert(model, folder or Path(temporary))
    return Pair(model, cfg, params)
