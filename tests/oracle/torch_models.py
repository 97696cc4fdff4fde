"""The other side: models of transformers, and what they answer."""

from pathlib import Path
from typing import Any

import numpy as np


def open_model(folder: Path) -> Any:
    """Returns the causal model of a folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns a model's logits."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def greedy(model: Any, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """Returns `count` tokens after each prompt, from a left-padded batch, end tokens or not."""
    import torch

    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    whole = model.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return whole[:, width:].tolist()
