"""Rebuilds everything embedded: the tiny base model, its tokenizer, and the examples' rows.

    python scripts/build_tiny_base.py              # all of it, weights included
    python scripts/build_tiny_base.py --no-weights # tokenizer, config and rows only (seconds)

Text and trained models are written to `build/tiny-base`, the result to
`jaxlora/assets`. The base is trained from random weights by jaxlora's own full-parameter mode.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.flax import load_file, save_file
from tiny_corpus import base_rows, classification_rows, held_out_lists, quickstart_rows
from tiny_dialogues import conversation_rows, tool_rows
from tiny_tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "tiny-base"
ASSETS = ROOT / "jaxlora" / "assets"
TRAINING = Path(__file__).with_name("tiny_base.yml")

SEED = 0
STORIES, CHATS, HELD_OUT = 5_000, 50_000, 200
TOKENIZER_ROWS = 10_000  # enough to rank the world's words; more changes no merge that matters
TRAIN_ROWS, TEST_ROWS = 2500, 150

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.06,
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
    write_rows(BUILD / "held_out.jsonl", held_out_lists(SEED, HELD_OUT))
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


def train(start: Path, trained: Path) -> None:
    """Trains every parameter with jaxlora, from random weights, to `trained`."""
    import jaxlora  # only this step needs the trainer

    jaxlora.train(TRAINING, f"--base_model={start}", f"--output_dir={trained}")


def export(trained: Path, target: Path) -> None:
    """Copies the trained weights to the assets in bfloat16."""
    weights = load_file(trained / "model.safetensors")
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
        rows = classification_rows(SEED, count * 2 // 5, held_out=held_out)
        write_rows(ASSETS / "classification" / f"{name}.jsonl", rows)
        for task, rows_of in (("dialogues", conversation_rows), ("tools", tool_rows)):
            rows = rows_of(SEED, count // 5, held_out=held_out)
            write_rows(ASSETS / task / f"{name}.jsonl", rows)
    texts = write_text()
    write_folder(ASSETS / "tiny-llama", texts)
    if options.no_weights:
        return
    start, trained = BUILD / "start", BUILD / "trained"
    for folder in (start, trained):
        shutil.rmtree(folder, ignore_errors=True)
    write_folder(start, texts)
    train(start, trained)
    export(trained, ASSETS / "tiny-llama")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
