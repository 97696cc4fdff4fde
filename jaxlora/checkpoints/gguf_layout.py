"""What llama.cpp changes of a Hugging Face model: names, row order, offsets, words for its options.

From llama.cpp's convert_hf_to_gguf.py (`LlamaModel`, `Qwen2Model`, `Qwen3Model`, `GemmaModel`,
`Gemma2Model`, `Gemma3Model`) and gguf-py's tensor_mapping.py. One row an architecture; both
directions read it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.core.errors import UserError

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_QK_NORMS = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_SANDWICH = {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
# Keys after the architecture's name, and config.json's words for them.
_LLAMA_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one architecture is written in GGUF.

    Attributes:
      gguf: llama.cpp's name of it (general.architecture).
      hf: the class in config.json's `architectures`.
      model_type: config.json's model_type.
      names: llama.cpp's module names to Hugging Face's, ``{}`` for the layer.
      keys: metadata keys to config.json's fields.
      fixed: fields of config.json that go without saying in GGUF.
      derived: fields that llama.cpp derives from the others.
      interleaved: whether the rows of q and k are those of interleaved rotary embeddings.
      norm_offset: what GGUF adds to the weights of norms.
    """

    gguf: str
    hf: str
    model_type: str
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_NAMES)
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_KEYS)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = dataclasses.field(
        default_factory=dict
    )
    interleaved: bool = False
    norm_offset: float = 0.0

    def hf_name(self, name: str) -> str | None:
        """Returns Hugging Face's name of a GGUF tensor, None if it has none.

        >>> LAYOUTS[0].hf_name("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
        """
        return _translate(name, self.names)

    def gguf_name(self, name: str) -> str | None:
        """Returns GGUF's name of a Hugging Face tensor, None if it has none."""
        return _translate(name, {hf: gguf for gguf, hf in self.names.items()})

    def is_interleaved(self, hf_name: str) -> bool:
        """Whether GGUF has the rows of this tensor in another order."""
        return self.interleaved and hf_name.rpartition(".")[0].endswith(("q_proj", "k_proj"))

    def offset(self, hf_name: str) -> float:
        """Returns what GGUF adds to this tensor."""
        return self.norm_offset if hf_name.endswith("norm.weight") else 0.0


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    module, _, kind = name.rpartition(".")
    layer = re.search(r"(?<=\.)\d+(?=\.)", module)
    pattern = module if layer is None else f"{module[: layer.start()]}{{}}{module[layer.end() :]}"
    found = table.get(pattern)
    return None if found is None else f"{found.format(layer and layer[0])}.{kind}"


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}


def _gemma2_query_scalar(config: Mapping[str, Any]) -> int:
    # llama.cpp knows the 27B model, the only one that differs, by its number of layers.
    largest = config["num_hidden_layers"] == 46
    default = config["hidden_size"] // config["num_attention_heads"]
    return default if largest else config["head_dim"]


LAYOUTS = (
    Layout("llama", "LlamaForCausalLM", "llama", interleaved=True),
    Layout("llama", "MistralForCausalLM", "mistral", interleaved=True),
    Layout("qwen2", "Qwen2ForCausalLM", "qwen2"),
    Layout("qwen3", "Qwen3ForCausalLM", "qwen3", {**_LLAMA_NAMES, **_QK_NORMS}),
    Layout("gemma", "GemmaForCausalLM", "gemma", fixed=_GELU, norm_offset=1.0),
    Layout(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        {**_LLAMA_NAMES, **_SANDWICH},
        {**_LLAMA_KEYS, **_SOFTCAPS},
        fixed=_GELU,
        derived={"query_pre_attn_scalar": _gemma2_query_scalar},
        norm_offset=1.0,
    ),
)


def layout_of(key: str, read: Callable[[Layout], str]) -> Layout:
    """Returns the first row whose `read` is `key`.

    Raises:
      UserError: none is.
    """
    for layout in LAYOUTS:
        if read(layout) == key:
            return layout
    known = ", ".join(dict.fromkeys(read(layout) for layout in LAYOUTS))
    raise UserError(f"{key!r} models are not read from or written to GGUF; supported: {known}.")
