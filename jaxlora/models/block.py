"""One layer: attention and MLP with their norms around the residual stream."""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.models.config import ModelConfig
from jaxlora.models.layers import Attention, Mlp, Norm
from jaxlora.models.mla import LatentAttention
from jaxlora.models.moe import MixtureOfExperts, Spread, in_place
from jaxlora.models.stacks import LayerShape


class Block(nnx.Module):
    """Attention, then MLP (or both at once), each between the norms of `ModelConfig.norms`."""

    def __init__(self, cfg: ModelConfig, shape: LayerShape, spread: Spread = in_place):
        self.cfg = cfg

        def norm(place: str) -> Norm | None:
            asked = place in shape.norms
            return Norm((cfg.embed_dim,), cfg, bias=cfg.norm_bias) if asked else None

        self.attention_in_norm, self.attention_out_norm = (
            norm("attention_in"),
            norm("attention_out"),
        )
        self.mlp_in_norm, self.mlp_out_norm = norm("mlp_in"), norm("mlp_out")
        self.attention_sum_norm, self.mlp_sum_norm = norm("attention_sum"), norm("mlp_sum")
        self.attention = Attention(cfg) if cfg.mla is None else LatentAttention(cfg)
        self.mlp = MixtureOfExperts(cfg, spread) if shape.experts else Mlp(cfg)

    def __call__(self, x, angles, visible, attend, cache, index):
        scale, into = self.cfg.residual_scale, _through(self.attention_in_norm, x)
        y, cache = self.attention(into, angles, visible, attend, cache, index)
        y = _through(self.attention_out_norm, y) * scale
        if self.cfg.parallel_block:
            z = self.mlp(into if self.mlp_in_norm is None else self.mlp_in_norm(x))
            return x + y + _through(self.mlp_out_norm, z) * scale, cache
        x = checkpoint_name(_through(self.attention_sum_norm, x + y), "middle")
        z = self.mlp(_through(self.mlp_in_norm, x))
        x = x + _through(self.mlp_out_norm, z) * scale
        return _through(self.mlp_sum_norm, x), cache


def _through(norm: Norm | None, x):
    return x if norm is None else norm(x)
