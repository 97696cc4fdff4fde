"""What distinguishes one transformer from another, as data."""

import dataclasses

from jaxlora.ops.experts import Routing
from jaxlora.ops.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Moe:
    """A mixture of experts in place of the MLP (Shazeer et al. 2017).

    Attributes:
      layers: the layers that have one; the others have the MLP of `ModelConfig`.
      num_experts: experts E of a layer.
      mlp_dim: width F of an expert.
      routing: how tokens choose experts.
      router_bias: whether the router has a bias.
      correction: whether each expert has a number that is added to its score for the choice only
        (DeepSeek-V3 balances the load with it; it is no trained weight).
      shared_dim: width of an MLP that every token passes besides, 0 for none.
      shared_gate: whether that MLP's output is multiplied by a gate of its own, a sigmoid.
      bias: whether the experts have biases.
      transposed: whether Hugging Face stores the experts' matrices ``[out, in]``.
      interleaved: whether gate and up alternate along the columns, rather than one after the other.
      clamp: gate and up are cut off at this size before they are multiplied, gpt-oss' way
        (`jaxlora.ops.activations.clamped_swiglu`); None for the activation of `ModelConfig`.
      gain: of the sigmoid there.
    """

    layers: tuple[int, ...]
    num_experts: int
    mlp_dim: int
    routing: Routing
    router_bias: bool = False
    correction: bool = False
    shared_dim: int = 0
    shared_gate: bool = False
    bias: bool = False
    transposed: bool = True
    interleaved: bool = False
    clamp: float | None = None
    gain: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mla:
    """Latent attention: keys and values through a bottleneck (DeepSeek-V2, 2024, section 2.1).

    A head's queries and keys have channels without position, then channels that are turned; the
    turned part of the key is one for all heads.

    Attributes:
      q_rank: width of the queries' bottleneck, None for none.
      kv_rank: width of the bottleneck of keys and values.
      rope_dim: turned channels; `ModelConfig.head_dim` counts both kinds.
      value_dim: channels of a head's values.
      norm_eps: of the norms in the bottlenecks.
    """

    q_rank: int | None
    kv_rank: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a transformer; `jaxlora.models.families` reads it from HF.

    Every default is LLaMA's, so that a family is the few fields in which it differs.

    Attributes:
      num_kv_heads: key-value heads K; ``num_heads / K`` query heads share each (GQA).
      head_dim: channels per head; need not be ``embed_dim / num_heads``.
      extra_layers: layers that files hold after the last, to guess further tokens; not loaded.
      max_context: positions the model was trained for.
      family: key of `jaxlora.models.families.FAMILIES`: where the parameter names come from.
      tie_embedding: whether the head is the embedding.
      head_bias: whether the head has a bias.
      head_activation: activation of one more dense layer (and norm) before the head, which encoders
        have; None for none.
      head_dense_bias, head_norm: whether that layer has a bias and is followed by a norm.
      num_labels: classes of a sequence classifier, 0 for a model of tokens; its head reads one
        hidden state for each text.
      pooling: which: that of the ``first`` token, of the ``last``, or the ``mean`` of all.
      embed_scale: multiplies the embedded tokens.
      embed_norm: whether the embedded tokens are normed.
      token_types: rows of a learned table of token types (BERT: first or second text), 0 for none.
      logit_scale: multiplies the logits.
      logit_softcap: logits are bent into ``(-logit_softcap, logit_softcap)`` by a tanh.
      learned_positions: rows of a learned position table, 0 for none.
      position_offset: row of the table for position 0.
      rotary_dim: channels of a head that rotary positions turn, 0 for none, None for all.
      rope_interleaved: whether the turned pairs are ``(2i, 2i + 1)``.
      nope_layers: layers without rotary positions.
      sliding_window: a query sees at most this many latest tokens; None sees all.
      sliding_layers: layers with the window; None for all.
      local_rope_theta: rotary base (without scaling) of the layers with a window, None for the
        same as in the others.
      causal: whether a token sees only earlier ones.
      qkv_layout: ``separate`` projections, one ``concatenated`` (all queries, all keys, all
        values), or one ``grouped`` by key-value head (its queries, its key, its value).
      qkv_bias, output_bias: whether those projections have a bias.
      qk_norm: norm of queries and keys before they are turned: over each ``head`` (one weight for
        all), over each head with a weight for ``each_head``, or over all heads (``full``).
      attention_scale: what scores are multiplied by, None for ``head_dim ** -0.5``.
      attention_softcap: as `logit_softcap`, for the scores.
      attention_sinks: whether each head has one more score that takes weight and gives no value.
      mla: latent attention, None for the usual.
      norm: ``rms`` or ``layer`` (mean subtracted).
      norm_bias: whether norms (but not those of queries and keys: `qk_norm_bias`) have a bias.
      norm_offset: added to the weight of a norm.
      norms: where a layer has norms: before (``in``) and after (``out``) attention and MLP, or on
        the stream after each was added (``sum``).
      bare_layers: layers whose attention reads the stream without its ``attention_in`` norm.
      final_norm: whether the last hidden states are normed.
      parallel_block: attention and MLP both read the layer's input; without an ``mlp_in`` norm the
        MLP shares attention's.
      residual_scale: multiplies what attention and MLP add to the stream.
      activation: key of `jaxlora.ops.activations.ACTIVATIONS`.
      mlp_gated: ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``.
      mlp_fused: gate and up are one projection.
      moe: mixture of experts, None for an MLP in every layer.
      conv1d: whether Hugging Face stores the matrices of the layers ``[in, out]`` (GPT-2).
      renamed: ``(our module, Hugging Face's)`` pairs that overrule the family's table of names.
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
    rope_theta: float = 10000.0
    family: str = "LlamaForCausalLM"
    extra_layers: int = 0
    tie_embedding: bool = False
    head_bias: bool = False
    head_activation: str | None = None
    head_dense_bias: bool = True
    head_norm: bool = True
    num_labels: int = 0
    pooling: str = "last"
    embed_scale: float = 1.0
    embed_norm: bool = False
    token_types: int = 0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    learned_positions: int = 0
    position_offset: int = 0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    nope_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    local_rope_theta: float | None = None
    causal: bool = True
    qkv_layout: str = "separate"
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: str | None = None
    qk_norm_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    mla: Mla | None = None
    norm: str = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    norms: tuple[str, ...] = ("attention_in", "mlp_in")
    bare_layers: tuple[int, ...] = ()
    final_norm: bool = True
    parallel_block: bool = False
    residual_scale: float = 1.0
    activation: str = "silu"
    mlp_gated: bool = True
    mlp_fused: bool = False
    mlp_bias: bool = False
    moe: Moe | None = None
    conv1d: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    init_std: float = 0.02

    @property
    def value_dim(self) -> int:
        """Channels of a head's values."""
        return self.head_dim if self.mla is None else self.mla.value_dim
