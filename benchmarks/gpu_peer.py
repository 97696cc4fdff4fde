"""The same step by transformers + PEFT on one GPU, at its usual setting; a JSON line.

    python benchmarks/gpu_peer.py MODEL ROWS LENGTH

LoRA r=16 on all linear layers of a random bfloat16 model, SDPA attention, gradient checkpointing
(the shape does not fit without), fused AdamW on the adapter. MODEL is one of `gpu_model.MODELS`.
"""

import json
import sys
import time

import torch
from gpu_model import MODELS, RANK
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

WARM_UP, STEPS = 3, 8


def main(name: str, rows: int, length: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {
        k: v for k, v in MODELS[name].items() if k not in ("architectures", "sliding_window")
    }
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**options))
        model.set_attn_implementation("sdpa")
    model.config.use_cache = False
    targets = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(model, targets).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-4, fused=device == "cuda")
    tokens = torch.randint(0, model.config.vocab_size, (rows, length), device=device)

    def step() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for _ in range(WARM_UP):
        loss = float(step())
    seconds = []
    for _ in range(STEPS):
        started = time.monotonic()
        loss = float(step())
        seconds.append(time.monotonic() - started)
    median = sorted(seconds)[STEPS // 2]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    found = {"peer": "transformers + PEFT", "model": name, "rows": rows, "length": length}
    found |= {"storage": "bf16", "step_s": seconds, "loss": loss, "peak_bytes": peak}
    found |= {"tokens_per_s": round(rows * length / median), "torch": torch.__version__}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
