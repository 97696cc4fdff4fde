"""Checkpoints to load: a random one of any size, and one that is all headers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Shapes = dict[str, tuple[int, ...]]

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA_1B | {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def shapes(config: Mapping) -> Shapes:
    """Returns the tensors of a LLaMA, in the order of its layers."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    tensors: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for number in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            tensors[f"model.layers.{number}.{name}.weight"] = shape
    return tensors | {
        "model.norm.weight": (width,),
        "lm_head.weight": (config["vocab_size"], width),
    }


def write_random(folder: Path, config: Mapping, *, shards: int = 4) -> int:
    """Writes a bfloat16 checkpoint of normal numbers; returns its bytes."""
    numbers = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    pool = (numbers * 0.02).astype(ml_dtypes.bfloat16)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        start = hash(name) % 4096  # no two tensors alike, and no new numbers for each
        return np.resize(pool[start:], shape)

    for file, part in _files(shapes(config), shards):
        save_file({name: tensor(name, shape) for name, shape in part.items()}, folder / file)
    _write_index(folder, config, shards)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_headers(
    folder: Path,
    config: Mapping,
    *,
    shards: int = 30,
    stored: Shapes | None = None,
) -> None:
    """Writes a checkpoint whose data are holes in sparse files: it has a size and takes no disk.

    Args:
      folder: where to.
      config: of the model, and of the index.
      shards: number of files.
      stored: what the shards hold, where it is not what the index says.
    """
    stored = shapes(config) if stored is None else stored
    for file, part in _files(shapes(config), shards):
        entries, end = {}, 0
        for name in (name for name in part if name in stored):
            start, end = end, end + 2 * int(np.prod(stored[name]))
            entries[name] = {
                "dtype": "BF16",
                "shape": stored[name],
                "data_offsets": [start, end],
            }
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(header).to_bytes(8, "little") + header)
            opened.truncate(8 + len(header) + end)
    _write_index(folder, config, shards)


def _files(tensors: Shapes, shards: int) -> Iterator[tuple[str, Shapes]]:
    names = list(tensors)
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        yield _file(number, shards), {name: tensors[name] for name in part}


def _file(number: int, shards: int) -> str:
    return f"model-{number + 1:05}-of-{shards:05}.safetensors"


def _write_index(folder: Path, config: Mapping, shards: int) -> None:
    weight_map = {name: file for file, part in _files(shapes(config), shards) for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
