"""A mixture of experts in place of the MLP: router, experts, and an MLP that all tokens share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxlora.core import axes
from jaxlora.models.config import ModelConfig, Moe
from jaxlora.models.layers import Linear, Mlp
from jaxlora.models.parameters import ParamSpec, declare
from jaxlora.ops.activations import ACTIVATIONS, clamped_swiglu
from jaxlora.ops.experts import Dispatch, grouped_matmul, route


class ExpertLinear(nnx.Module):
    """``x @ kernel[expert] (+ bias[expert])`` for rows sorted by expert."""

    def __init__(
        self, shape: tuple[int, int], logical_axes: tuple[str, str], cfg: ModelConfig, moe: Moe
    ):
        every, names = (moe.num_experts, *shape), (axes.EXPERT, *logical_axes)
        self.kernel = declare(ParamSpec(every, names, cfg.init_std, moe.transposed, "experts"))
        bias = ParamSpec((every[0], every[2]), (names[0], names[2]), "zeros", kind="bias")
        self.bias = declare(bias) if moe.bias else None

    def __call__(self, x: Float[Array, "M I"], to: Dispatch) -> Float[Array, "M O"]:
        y = grouped_matmul(x, self.kernel.get_value(), to.sizes)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)[to.experts]


class Experts(nnx.Module):
    """Gated MLPs, one for each expert."""

    def __init__(self, cfg: ModelConfig, moe: Moe):
        self.cfg, self.moe = cfg, moe
        widen, narrow = (cfg.embed_dim, 2 * moe.mlp_dim), (moe.mlp_dim, cfg.embed_dim)
        self.gate_up_proj = ExpertLinear(widen, (axes.EMBED, axes.MLP), cfg, moe)
        self.down_proj = ExpertLinear(narrow, (axes.MLP, axes.EMBED), cfg, moe)

    def __call__(self, x: Float[Array, "M D"], to: Dispatch) -> Float[Array, "M D"]:
        gate_up, moe = self.gate_up_proj(x, to), self.moe
        if moe.interleaved:
            gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
        else:
            gate, up = jnp.split(gate_up, 2, axis=-1)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        if moe.clamp is None:
            hidden = ACTIVATIONS[self.cfg.activation](gate) * up
        else:
            hidden = clamped_swiglu(gate, up, clamp=moe.clamp, gain=moe.gain)
        return self.down_proj(hidden, to)


class MixtureOfExperts(nnx.Module):
    """Each token goes through the experts its router chooses; see `Moe`."""

    def __init__(self, cfg: ModelConfig):
        assert cfg.moe is not None
        self.moe = moe = cfg.moe
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
        y = self._routed(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = jax.nn.sigmoid(self.shared_gate(x)) * shared
        return y + shared

    def _routed(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        correction = None if self.correction is None else self.correction.get_value()
        # In float32: a rounded logit may send a token elsewhere.
        logits = self.router(x, out_dtype=jnp.float32)
        weights, experts = route(logits, self.moe.routing, correction)
        to = Dispatch.to(experts, self.moe.num_experts)
        return to.gather(self.experts(to.spread(x), to), weights)
