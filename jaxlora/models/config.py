"""What distinguishes one transformer from another, as data."""

import dataclasses

from jaxlora.ops.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder-only transformer; `jaxlora.models.families` reads it from HF.

    Attributes:
      num_kv_heads: key-value heads K; ``num_heads / K`` query heads share each (GQA).
      head_dim: channels per head; need not be ``embed_dim / num_heads``.
      max_context: positions the model was trained for.
      sliding_window: a query sees at most this many latest tokens; None sees all.
      attention_bias, mlp_bias: whether those projections have a bias.
      init_std: standard deviation of fresh weights (training from scratch only).
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tie_embedding: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    init_std: float = 0.02
