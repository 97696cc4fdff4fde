"""GGUF files as llama.cpp's convert_hf_to_gguf.py writes them, without jaxlora's writer."""

import json

import numpy as np
from safetensors.numpy import load_file

TEXTS = ("Hello, world!", " two  spaces and\n\nlines", "I've 123 caf\u00e9s, they'LL \u4f60", "")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
# llama.cpp's names, in the order of convert_hf_to_gguf.py's tensor map.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}
GEMMA2_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "block_count": "num_hidden_layers",
}


def permute(weights, heads):
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_name(name, names=NAMES):
    for theirs, short in names.items():
        name = name.replace(theirs, short)
    return name


def gguf_weights(config, weights, architecture="llama"):
    """Hugging Face's tensors by llama.cpp's names and in its layout."""
    names = GEMMA2_NAMES if architecture == "gemma2" else NAMES
    written = {}
    for name, values in weights.items():
        values = np.asarray(values, np.float32)
        if architecture == "llama" and "q_proj" in name:
            values = permute(values, config["num_attention_heads"])
        if architecture == "llama" and "k_proj" in name:
            values = permute(values, config["num_key_value_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        written[gguf_name(name, names)] = values
    return written


def write_gguf(path, config, weights, kind="F16", *, architecture="llama", raw=(), more=()):
    """Writes a file; matrices in `kind` (or the bytes of `raw`), the rest in float32.

    Args:
      config: content of config.json.
      weights: from `gguf_weights`.
      raw: ``{name: (type, bytes)}`` of tensors that gguf-py cannot quantize itself.
      more: ``(method of GGUFWriter, arguments)`` of further metadata.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, field in KEYS.items():
        if config.get(field) is not None:
            writer.add_uint32(f"{architecture}.{key}", config[field])
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{architecture}.rope.freq_base", config.get("rope_theta", 10000.0))
    for method, *arguments in more:
        getattr(writer, method)(*arguments)
    raw = dict(raw)
    for name, values in weights.items():
        if name in raw:
            kind_of, blocks = raw[name]
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind_of])
            continue
        chosen = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(values), chosen)
        writer.add_tensor(name, data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_folder(folder):
    """Content of config.json, and the tensors, of a Hugging Face folder."""
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def wrapped(tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def byte_level(split=LLAMA3_SPLIT):
    """A tokenizer as Llama 3's: byte-level BPE behind a regular expression."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS * 3, "hello spaces and lines they have"], trainer)
    tokenizer.add_tokens(["<think>"])
    return wrapped(tokenizer)
