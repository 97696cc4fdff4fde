"""Greedy generation on a CPU beside transformers' `generate` at its best setting.

    python benchmarks/generate.py [--new 48] [--rounds 5] [--allow-busy]

A Llama of 110 million parameters with random weights in float32, written once in Hugging Face's
layout. Either side loads it in a process of its own, and they take turns (A B A B ...); what is
timed is one call that reads the prompts and writes `--new` tokens for each. transformers is tried
with its dynamic and its static cache, on one thread and on all; ratios are taken to the best, pair
by pair. Nothing is reported unless all tokens of all rows are equal.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
from turns import Program

from jaxlora.core.errors import UserError

LLAMA_110M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
BATCHES = (1, 8)
PROMPT = 32

OURS = """
import sys
from pathlib import Path
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.generation.decoding import generate
from jaxlora.generation.layout import for_decoding
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.models.transformer import Transformer
folder = Path(sys.argv[1])
cfg, _ = read_model_config(folder)
params = for_decoding(load_params(folder, cfg, dtype="float32"), cfg)
def turn(prompts, new):
    options = SamplingOptions(max_new_tokens=new)
    return generate(Transformer(cfg), params, prompts, options, batch_size=len(prompts))
"""
THEIRS = """
import sys
import torch, transformers
folder, threads, cache = sys.argv[1:]
torch.set_num_threads(int(threads))
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="sdpa").eval()
model.generation_config.eos_token_id = None  # all tokens are written, whichever they are
options = {} if cache == "dynamic" else {"cache_implementation": cache, "disable_compile": True}
def turn(prompts, new):
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=new, pad_token_id=0, **options)
    return found[:, ids.shape[1]:].tolist()
"""


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Writes the model; its logits have a standard deviation of about 1."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, config["hidden_size"] ** -0.5)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


def learners(folder: Path) -> dict[str, Callable[[], Program]]:
    """Returns how each side is started, ours first."""
    made: dict[str, Callable[[], Program]] = {"jaxlora": lambda: Program(OURS, str(folder))}
    for threads in sorted({1, os.cpu_count() or 1}):
        for cache in ("dynamic", "static"):
            made[f"transformers, {threads} threads, {cache} cache"] = (
                lambda threads=threads, cache=cache: Program(
                    THEIRS, str(folder), str(threads), cache
                )
            )
    return made


def measure(config: dict[str, Any], new: int, rounds: int) -> dict[str, Any]:
    """Returns what was measured for every batch.

    Raises:
      UserError: a token differs.
    """
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), config)
        programs = {side: start() for side, start in learners(Path(name)).items()}
        try:
            return {str(batch): _batch(programs, config, batch, new, rounds) for batch in BATCHES}
        finally:
            for program in programs.values():
                program.close()


def _batch(programs: dict[str, Program], config: dict, batch: int, new: int, rounds: int) -> dict:
    rng = np.random.default_rng(batch)
    prompts = rng.integers(3, config["vocab_size"], (batch, PROMPT)).tolist()
    first = {side: program.turn(prompts, new) for side, program in programs.items()}
    ours = first["jaxlora"]["result"]
    for side, found in first.items():
        if found["result"] != ours:
            raise UserError(f"batch {batch}: tokens of {side} differ from jaxlora's: no speed.")
    # One round of all finds the best peer; then it and we take turns.
    trial = {side: program.turn(prompts, new)["wall_s"] for side, program in programs.items()}
    best = min((side for side in programs if side != "jaxlora"), key=lambda side: trial[side])
    turns: dict[str, list[dict]] = {"jaxlora": [], best: []}
    for _ in range(rounds):
        for side in turns:
            turns[side].append(programs[side].turn(prompts, new))
    ratios = [b["wall_s"] / a["wall_s"] for a, b in zip(*turns.values(), strict=True)]
    median = {
        side: {key: statistics.median(turn[key] for turn in each) for key in ("wall_s", "cpu_s")}
        for side, each in turns.items()
    }
    return {
        "tokens_per_s": {side: batch * new / each["wall_s"] for side, each in median.items()},
        "cpu_ms_per_step": {side: 1e3 * each["cpu_s"] / new for side, each in median.items()},
        "first_call_s": {side: each["wall_s"] for side, each in first.items()},
        "trial_s": trial,
        "best_peer": best,
        "distinct_tokens": len({token for row in ours for token in row}),
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


def table(result: dict[str, Any]) -> str:
    """Returns the batches as a table."""
    lines = [
        "| batch | jaxlora, tokens/s | best peer, tokens/s | ratio, pair by pair "
        "| CPU ms a step, ours and theirs | our first call, s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for batch, found in result["batches"].items():
        best, (low, high) = found["best_peer"], found["range"]
        speed, cpu = found["tokens_per_s"], found["cpu_ms_per_step"]
        lines.append(
            f"| {batch} | {speed['jaxlora']:.1f} | {speed[best]:.1f} ({best}) | "
            f"{found['ratio']:.2f} ({low:.2f} to {high:.2f}) | {cpu['jaxlora']:.1f}, "
            f"{cpu[best]:.1f} | {found['first_call_s']['jaxlora']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new", type=int, default=48, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=5)

    def found(options: argparse.Namespace) -> dict[str, Any]:
        batches = measure(LLAMA_110M, options.new, options.rounds)
        return {"prompt": PROMPT, "new": options.new, "batches": batches}

    machine.run("generate", parser, found, table)


if __name__ == "__main__":
    main()
