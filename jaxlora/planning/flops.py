"""Arithmetic of a train step by formula: what the model needs, and what a remat policy repeats."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec
from jaxlora.models.stacks import attention_kinds
from jaxlora.ops.layout import ways
from jaxlora.parallel.head_shares import shares_over_context
from jaxlora.planning.program import Program
from jaxlora.training.step import trains_head


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations for one token.

    Attributes:
      model: forward and backward pass as the method needs them: 4 for each frozen weight (there
        is no gradient of it), 6 for each trained one, 3 forward passes of attention.
      repeated: what the backward pass computes again to save memory.
      wasted: what attention over `context` computes for nothing: heads of zeros, or the scores of
        keys that a query does not see.
    """

    model: float
    repeated: float
    wasted: float = 0.0

    @property
    def executed(self) -> float:
        """What the hardware does."""
        return self.model + self.repeated + self.wasted


def flops_per_token(program: Program, length: int) -> Flops:
    """Returns the arithmetic of training on rows of `length` tokens, each one sequence.

    Packed rows of shorter sequences have less attention. Left out, as below 1 %: norms, rotary
    angles, activations.

    >>> Flops(model=4.0, repeated=2.0).executed
    6.0
    """
    shape = program.shape
    cfg, specs = shape.cfg, shape.specs
    whole = {path for path, part in shape.parts.items() if part.whole}
    attention = _attention(cfg, length)
    pairs = _pairs(program)
    model, layers, down, head = 3 * attention + 6 * pairs, 0.0, 0.0, 0.0
    for path, spec in specs.items():
        weights = active_weights(spec, cfg)
        model += weights * (6 if path in whole else 4)
        if spec.kind == "head":
            head += weights
        elif weights:
            layers += weights
            narrow = spec.axes[-2:] == (axes.MLP, axes.EMBED)
            down += weights if narrow else 0.0
    if cfg.tie_embedding and not cfg.num_labels:
        head = float(cfg.vocab_size * cfg.embed_dim)
        model += head * (6 if "embed/embedding" in whole else 4)
    # The output of an MLP's last matrix is not needed to go back through it.
    repeated = {
        "none": 0.0,
        "full": (everything := 2 * (layers - down) + attention + 2 * pairs),
        "offload": everything,
        "attention": 2 * (_named(specs, cfg, axes.MLP) + _output(specs, cfg)),
        "matmuls": 2 * _output(specs, cfg),
    }[shape.transformer.remat]
    # Logits are computed twice where the head may train.
    again = trains_head(shape.transformer, program.trainable)
    passes = 4 if shape.transformer.remat == "full" else 3
    wasted = passes * _wasted(cfg, shape.placement.mesh, length)
    return Flops(model, repeated + (2 * head if again else 0.0), wasted)


def active_weights(spec: ParamSpec, cfg: ModelConfig) -> float:
    """Returns how many numbers of a parameter each token is multiplied by; 0 for what is no matrix.

    Of the experts of a mixture a token passes only some.
    """
    if spec.kind not in ("linear", "experts", "router", "head"):
        return 0.0
    if spec.kind == "experts" and cfg.moe is not None:
        return spec.size * cfg.moe.routing.top_k / cfg.moe.num_experts
    return float(spec.size)


def _wasted(cfg: ModelConfig, mesh: Any, length: int) -> float:
    """What a forward pass of attention over `context` computes and nobody needs."""
    if ways(mesh, axes.SEQUENCE) == 1:
        return 0.0
    needed = _attention(cfg, length)
    shares = shares_over_context(mesh, cfg.num_heads, cfg.num_kv_heads)
    if shares is None:
        every = 2 * cfg.num_heads * (cfg.head_dim + cfg.value_dim) * length
        return cfg.num_layers * every - needed
    return needed * (shares.filled - shares.num_heads) / shares.num_heads


def _attention(cfg: ModelConfig, length: int) -> float:
    """A forward pass of scores and weighted sums."""
    total = 0.0
    for kind in attention_kinds(cfg):
        seen = float(length)
        if cfg.causal:
            window = min(kind.window or length, length)
            seen = window - window * window / (2 * length)
        elif kind.window:
            seen = min(2 * kind.window, length)
        total += 2 * cfg.num_heads * (cfg.head_dim + cfg.value_dim) * seen
    return total


def _pairs(program: Program) -> float:
    """Numbers of the low-rank pairs that each token is multiplied by."""
    total = 0.0
    cfg, targets = program.shape.cfg, program.shape.targets
    for path, pair in program.trainable["adapter"].items():
        if "a" not in pair or targets[path].embedding:
            continue
        share = 1.0
        if targets[path].experts and cfg.moe is not None:
            share = cfg.moe.routing.top_k / cfg.moe.num_experts
        total += share * (pair["a"].size + pair["b"].size)
    return total


def _named(specs: Mapping[str, ParamSpec], cfg: ModelConfig, output: str) -> float:
    """Weights of the layers whose outputs have that axis."""
    return sum(
        active_weights(spec, cfg)
        for spec in specs.values()
        if spec.kind != "head" and len(spec.axes) > 1 and spec.axes[-1] == output
    )


def _output(specs: Mapping[str, ParamSpec], cfg: ModelConfig) -> float:
    """Weights from attention's heads back to the stream."""
    return sum(
        active_weights(spec, cfg)
        for spec in specs.values()
        if spec.axes[-2:] == (axes.HEADS, axes.EMBED)
    )
