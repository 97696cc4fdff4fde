"""Compilation: the train step of shallow and deep models.

    python benchmarks/compile_time.py [--rounds 3] [--allow-busy]

Layers are scanned, so that a deeper model is the same program over longer arrays. Shapes only:
nothing is allocated but what the compiler needs.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import machine

from jaxlora.lora import LoraConfig
from jaxlora.models.config import ModelConfig
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import describe
from jaxlora.models.targets import targets_of_specs
from jaxlora.models.transformer import Transformer
from jaxlora.optim.optimizers import make_optimizer
from jaxlora.training.step import make_train_step

DEPTHS = (2, 8, 32)
ROWS, TOKENS, RANK = 2, 256, 8
_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
MODELS = {
    "llama (layers alike)": {"architectures": ["LlamaForCausalLM"], **_SIZES},
    "gemma 3 (windows in 5 of 6 layers)": {
        "architectures": ["Gemma3ForCausalLM"],
        **_SIZES,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 64,
    },
    "qwen2-moe (experts in every other layer)": {
        "architectures": ["Qwen2MoeForCausalLM"],
        **_SIZES,
        **_EXPERTS,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 2,
    },
    "deepseek-v2 (first layer dense)": {
        "architectures": ["DeepseekV2ForCausalLM"],
        **_SIZES,
        **_EXPERTS,
        **_LATENT,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
    },
}


def make_config(name: str, layers: int) -> ModelConfig:
    """Returns one of `MODELS` with so many layers."""
    return read_config({**MODELS[name], "num_hidden_layers": layers})


def lower(cfg: ModelConfig) -> jax.stages.Lowered:
    """Returns the LoRA train step, lowered but not compiled, on all linear layers."""
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shaped(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    specs = describe(cfg)
    targets = targets_of_specs(specs, LoraConfig(r=RANK, alpha=RANK))
    adapter = {
        path: {
            "a": shaped((len(specs[path].layers or ()), specs[path].shape[0], RANK)),
            "b": shaped((len(specs[path].layers or ()), RANK, specs[path].shape[1])),
        }
        for path in targets
    }
    trainable = {"params": {}, "adapter": adapter}
    every = jax.tree.map(lambda leaf: True, trainable)
    tx = make_optimizer(
        "adamw", lambda step: 1e-4, decayed=every, matrices=every, max_grad_norm=1.0
    )
    moments = jax.eval_shape(tx.init, trainable)
    opt_state = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), moments)
    model = Transformer(cfg, remat="full")
    step = make_train_step(model, targets, tx, jax.random.key(0), (trainable, opt_state))
    names = ("tokens", "positions", "segment_ids", "targets")
    batch = {name: shaped((1, ROWS, TOKENS), jnp.int32) for name in names}
    batch["weights"] = shaped((1, ROWS, TOKENS))
    frozen = {path: shaped(spec.full_shape) for path, spec in specs.items()}
    return step.lower(trainable, opt_state, frozen, batch, shaped((), jnp.int32))


def measure(cfg: ModelConfig) -> dict[str, float]:
    """Returns seconds of tracing and of compiling, and the lines of the program between them."""
    jax.clear_caches()
    started = time.monotonic()
    lowered = lower(cfg)
    traced = time.monotonic()
    lowered.compile()
    compiled = time.monotonic()
    lines = len(lowered.as_text().splitlines())
    return {"trace_s": traced - started, "compile_s": compiled - traced, "lines": lines}


def measure_all(rounds: int) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Measures every model at every depth, in turns."""
    found: dict[str, dict[int, list]] = {name: {layers: [] for layers in DEPTHS} for name in MODELS}
    measure(make_config(next(iter(MODELS)), 2))  # the first pays for imports
    for _ in range(rounds):
        for name, by_depth in found.items():
            for layers, measured in by_depth.items():
                measured.append(measure(make_config(name, layers)))
    return found


def table(result: dict) -> str:
    """Returns the medians as a table."""
    head = " | ".join(f"{layers} layers" for layers in DEPTHS)
    lines = [
        f"| model | {head} | lines of the program |",
        "| --- |" + " ---: |" * (len(DEPTHS) + 1),
    ]
    for name, by_depth in result["measured"].items():
        seconds = [
            statistics.median(each["trace_s"] + each["compile_s"] for each in measured)
            for measured in by_depth.values()
        ]
        sizes = ", ".join(f"{measured[0]['lines']:,}" for measured in by_depth.values())
        lines.append(f"| {name} | {' | '.join(f'{each:.1f} s' for each in seconds)} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    sizes = {"rows": ROWS, "tokens": TOKENS, "rank": RANK, "models": MODELS}

    def found(options: argparse.Namespace) -> dict:
        return {"sizes": sizes, "measured": measure_all(options.rounds)}

    machine.run("compile-time", parser, found, table)


if __name__ == "__main__":
    main()
