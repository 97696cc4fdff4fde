"""Rebuilds everything embedded: the tiny base model, its tokenizer, and the quickstart's rows.

    python scripts/build_tiny_base.py              # all of it, weights included
    python scripts/build_tiny_base.py --no-weights # tokenizer, config and rows only (seconds)

Text, random start and trained model are written to `build/tiny-base`, the result to
`jaxlora/assets`. The base is trained from random weights by jaxlora's own full-parameter mode.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.flax import load_file, save_file
from tiny_corpus import base_rows, echo_rows, quickstart_rows
from tiny_tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "tiny-base"
ASSETS = ROOT / "jaxlora" / "assets"
TRAINING = Path(__file__).with_name("tiny_base.yml")

SEED = 0
ECHOES, STORIES, CHATS = 25_000, 16_000, 64_000
TOKENIZER_ROWS = 10_000  # enough to rank the world's words; more changes no merge that matters
TRAIN_ROWS, TEST_ROWS = 2500, 150

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}


def write_json(path: Path, content: dict) -> None:
    """Writes indented JSON with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_text() -> list[str]:
    """Writes the base's text to the build folder; returns the part the tokenizer is trained on."""
    stories, chats = base_rows(SEED, STORIES, CHATS)
    write_rows(BUILD / "echoes.jsonl", echo_rows(SEED, ECHOES))
    write_rows(BUILD / "stories.jsonl", stories)
    write_rows(BUILD / "chats.jsonl", chats)
    share = TOKENIZER_ROWS // 5  # the two kinds in the proportion of the whole
    texts = [row["text"] for row in stories[:share]]
    return texts + [m["content"] for row in chats[: 4 * share] for m in row["messages"]]


def write_folder(folder: Path, texts: list[str]) -> None:
    """Writes a Hugging Face model folder, all but the weights."""
    tokenizer = train_tokenizer(texts, vocab_size=MODEL["vocab_size"])
    save_tokenizer(tokenizer, folder, max_length=MODEL["max_position_embeddings"])
    names = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    ids = {key: tokenizer.token_to_id(token) for key, token in names.items()}
    write_json(folder / "config.json", MODEL | ids | {"dtype": "bfloat16"})
    write_json(folder / "generation_config.json", ids | {"do_sample": False})


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the model, as Hugging Face stores them."""
    width, hidden = MODEL["hidden_size"], MODEL["intermediate_size"]
    queries = MODEL["num_attention_heads"] * MODEL["head_dim"]
    keys = MODEL["num_key_value_heads"] * MODEL["head_dim"]
    shapes = {"model.embed_tokens.weight": (MODEL["vocab_size"], width)}
    for layer in range(MODEL["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (width,),
                "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (keys, width),
                "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, queries),
                "post_attention_layernorm": (width,),
                "mlp.gate_proj": (hidden, width),
                "mlp.up_proj": (hidden, width),
                "mlp.down_proj": (width, hidden),
            }.items()
        }
    return shapes | {"model.norm.weight": (width,)}


def write_random_weights(folder: Path) -> None:
    """Writes float32 weights to start from: ones for norms, normal for the rest."""
    rng = np.random.default_rng(SEED)
    tensors = {
        name: jnp.ones(shape)
        if len(shape) == 1
        else jnp.asarray(rng.normal(0.0, MODEL["initializer_range"], shape), jnp.float32)
        for name, shape in tensor_shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def train(random_start: Path, trained: Path) -> None:
    """Trains every parameter with jaxlora: first the echoes, then everything, to `trained`."""
    import jaxlora  # only this step needs the trainer

    copier = BUILD / "copier"
    shutil.rmtree(copier, ignore_errors=True)
    config = yaml.safe_load(TRAINING.read_text(encoding="utf-8"))
    first_lesson = {
        "datasets": [{"path": str(BUILD / "echoes.jsonl"), "type": "chat_template"}],
        "lr_scheduler": "constant_with_warmup",
        "cosine_min_lr_ratio": None,
    }
    jaxlora.train(
        config | first_lesson | {"base_model": str(random_start), "output_dir": str(copier)}
    )
    jaxlora.train(config | {"base_model": str(copier), "output_dir": str(trained)})


def export(trained: Path, target: Path) -> None:
    """Copies the trained weights to the assets in bfloat16, checked name by name."""
    weights = load_file(trained / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    assert shapes == tensor_shapes(), "the trained model is not the one that was started"
    halves = {name: tensor.astype(jnp.bfloat16) for name, tensor in weights.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Runs the steps in order."""
    parser = argparse.ArgumentParser(description="Rebuild the tiny base model and its data.")
    parser.add_argument("--no-weights", action="store_true", help="leave the weights alone")
    options = parser.parse_args()

    for name, count, held_out in (("train", TRAIN_ROWS, False), ("test", TEST_ROWS, True)):
        rows = quickstart_rows(SEED, count, held_out=held_out)
        write_rows(ASSETS / "quickstart" / f"{name}.jsonl", rows)
    texts = write_text()
    write_folder(ASSETS / "tiny-llama", texts)
    if options.no_weights:
        return
    random_start, trained = BUILD / "random", BUILD / "trained"
    shutil.rmtree(random_start, ignore_errors=True)
    shutil.rmtree(trained, ignore_errors=True)
    write_folder(random_start, texts)
    write_random_weights(random_start)
    train(random_start, trained)
    export(trained, ASSETS / "tiny-llama")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
