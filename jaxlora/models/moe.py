"""A mixture of experts in place of the MLP: router, experts, and an MLP that all tokens share."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig, Moe
from jaxlora.models.layers import Linear, Mlp
from jaxlora.models.parameters import ParamSpec, declare
from jaxlora.ops.activations import ACTIVATIONS, clamped_swiglu
from jaxlora.ops.experts import Dispatch, grouped_matmul, route

ExpertLeaves = tuple[Any, Any]


class ExpertLinear(nnx.Module):
    """``x @ kernel[expert] (+ bias[expert])`` for rows sorted by expert."""

    def __init__(
        self, shape: tuple[int, int], logical_axes: tuple[str, str], cfg: ModelConfig, moe: Moe
    ):
        every, names = (moe.num_experts, *shape), (axes.EXPERT, *logical_axes)
        self.kernel = declare(ParamSpec(every, names, cfg.init_std, moe.transposed, "experts"))
        bias = ParamSpec((every[0], every[2]), (names[0], names[2]), "zeros", kind="bias")
        self.bias = declare(bias) if moe.bias else None

    @property
    def leaves(self) -> ExpertLeaves:
        """Matrix and bias (or None), both ``[E, ...]``."""
        return self.kernel.get_value(), None if self.bias is None else self.bias.get_value()


def _linear(leaves: ExpertLeaves, x: Float[Array, "M I"], to: Dispatch) -> Float[Array, "M O"]:
    kernel, bias = leaves
    y = grouped_matmul(x, kernel, to.sizes)
    if bias is None:
        return y
    # 0 for the rows of experts that are not here.
    return y + bias.astype(y.dtype).at[to.experts].get(mode="fill", fill_value=0)


class OfExperts(Protocol):
    """What a share of the experts, from number `first` on, makes of tokens that chose experts."""

    def __call__(
        self,
        leaves: tuple[ExpertLeaves, ExpertLeaves],
        x: Float[Array, "B T D"],
        weights: Float[Array, "B T K"],
        experts: Int[Array, "B T K"],
        first: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]: ...


Choose = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


class Spread(Protocol):
    """How tokens and experts are brought together."""

    def __call__(
        self,
        choose: Choose,
        compute: OfExperts,
        leaves: tuple[ExpertLeaves, ExpertLeaves],
        x: Float[Array, "B T D"],
        logits: Float[Array, "B T E"],
        correction: Float[Array, "E"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns what the experts make of the tokens.

        Args:
          choose: of logits and correction: weight and number of each token's experts.
          compute: what experts make of tokens.
          leaves: of the experts.
          x, logits, correction: see `jaxlora.ops.experts.route`.
        """
        ...


def in_place(choose, compute, leaves, x, logits, correction):
    """`Spread` of one device, which has all of both."""
    return compute(leaves, x, *choose(logits, correction))


class Experts(nnx.Module):
    """Gated MLPs, one for each expert."""

    def __init__(self, cfg: ModelConfig, moe: Moe):
        self.cfg, self.moe = cfg, moe
        widen, narrow = (cfg.embed_dim, 2 * moe.mlp_dim), (moe.mlp_dim, cfg.embed_dim)
        self.gate_up_proj = ExpertLinear(widen, (axes.EMBED, axes.MLP), cfg, moe)
        self.down_proj = ExpertLinear(narrow, (axes.MLP, axes.EMBED), cfg, moe)

    @property
    def leaves(self) -> tuple[ExpertLeaves, ExpertLeaves]:
        """Those of both linear layers."""
        return self.gate_up_proj.leaves, self.down_proj.leaves

    def compute(self, leaves, x, weights, experts, first=None):
        """`OfExperts`."""
        num_experts = leaves[0][0].shape[0]
        to = Dispatch.to(experts.reshape(-1, experts.shape[-1]), num_experts, first)
        y = self._mlp(leaves, to.spread(x.reshape(-1, x.shape[-1])), to)
        return to.gather(y, weights.reshape(-1, weights.shape[-1])).reshape(x.shape)

    def _mlp(self, leaves, x: Float[Array, "M D"], to: Dispatch) -> Float[Array, "M D"]:
        gate_up, moe = _linear(leaves[0], x, to), self.moe
        if moe.interleaved:
            gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
        else:
            gate, up = jnp.split(gate_up, 2, axis=-1)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        if moe.clamp is None:
            hidden = ACTIVATIONS[self.cfg.activation](gate) * up
        else:
            hidden = clamped_swiglu(gate, up, clamp=moe.clamp, gain=moe.gain)
        return _linear(leaves[1], hidden, to)


class MixtureOfExperts(nnx.Module):
    """Each token goes through the experts its router chooses; see `Moe`."""

    def __init__(self, cfg: ModelConfig, spread: Spread = in_place):
        assert cfg.moe is not None
        self.moe, self.spread = cfg.moe, spread
        moe = cfg.moe
        to_experts = (axes.EMBED, axes.EXPERT_SCORES)
        self.router = Linear(
            (cfg.embed_dim, moe.num_experts), to_experts, cfg, bias=moe.router_bias, kind="router"
        )
        spec = ParamSpec((moe.num_experts,), (axes.EXPERT_SCORES,), "zeros", kind="buffer")
        self.correction = declare(spec) if moe.correction else None
        self.experts = Experts(cfg, moe)
        self.shared = Mlp(cfg, moe.shared_dim) if moe.shared_dim else None
        self.shared_gate = Linear((cfg.embed_dim, 1), to_experts, cfg) if moe.shared_gate else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = self._routed(x)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = jax.nn.sigmoid(self.shared_gate(x)) * shared
        return y + shared

    def _routed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        correction = None if self.correction is None else self.correction.get_value()
        # In float32: a rounded logit may send a token elsewhere.
        logits = self.router(x, out_dtype=jnp.float32)
        return self.spread(
            self._choose, self.experts.compute, self.experts.leaves, x, logits, correction
        )

    def _choose(self, logits, correction):
        return route(logits, self.moe.routing, correction)
