"""The first losses of a run are those of transformers, PEFT and torch over the same batches."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxlora
from jaxlora.checkpoints.peft import save_adapter
from jaxlora.config.load import load_config
from jaxlora.training.loop import train
from jaxlora.training.setup import make_plan
from jaxlora.training.state import load_weights

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

STEPS, WARMUP, RATE, CLIP = 20, 4, 1e-2, 0.5
# float32 on both sides; Adam divides by the root of small squares, so rounding grows with steps.
# Measured: 7e-6.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def config(tmp_path_factory, write_tiny_llama):
    """A LoRA run over rows of uneven length, accumulated, clipped and decayed."""
    folder = tmp_path_factory.mktemp("training")
    assets = Path(jaxlora.__file__).parent / "assets" / "tiny-llama"
    vocabulary = json.loads((assets / "tokenizer.json").read_text())["model"]["vocab"]
    sizes = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    base = write_tiny_llama(folder / "base", vocab_size=max(vocabulary.values()) + 1, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets / name, base)
    rng = random.Random(0)
    words = "red green blue cat dog house river stone seven eight".split()
    rows = [rng.choices(words, k=rng.randint(1, 8)) for _ in range(24)]
    records = [{"question": " ".join(row), "answer": " ".join(row[::-1])} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    kind = {"field_instruction": "question", "field_output": "answer", "format": "{instruction}\n"}
    keys = {
        "base_model": str(base),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": kind}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 64,
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "warmup_steps": WARMUP,
        "weight_decay": 0.1,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return load_config(keys)


def torch_losses(config, plan, start):
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    base = AutoModelForCausalLM.from_pretrained(config.base_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    model.eval()  # no dropout anyway; trained all the same
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.loraplus_lr_ratio is None:
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=config.weight_decay)
    else:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=config.loraplus_lr_ratio,
            loraplus_weight_decay=config.weight_decay,
        )
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        batch = {name: torch.tensor(array) for name, array in plan.batches.batch(step).items()}
        trained_tokens, total = batch["weights"].sum(), 0.0
        optimizer.zero_grad()
        for micro in range(batch["tokens"].shape[0]):
            part = {name: array[micro] for name, array in batch.items()}
            mask = (part["segment_ids"] > 0).long()
            logits = model(part["tokens"].long(), attention_mask=mask).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part["targets"].long().flatten(), reduction="none"
            )
            loss = (each * part["weights"].flatten()).sum() / trained_tokens
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        scheduler.step()
        losses.append(total)
    return np.array(losses), np.array(norms)


VARIANTS = {
    "lora": {},
    "lora+": {"loraplus_lr_ratio": 16.0},
    "dora+": {"loraplus_lr_ratio": 4.0, "peft_use_dora": True, "weight_decay": 0.0},
}


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.oracle] * (v != "lora")) for v in VARIANTS]
)
def test_the_first_losses_equal_transformers_and_peft(config, tmp_path, variant):
    config = config.model_copy(update={**VARIANTS[variant], "output_dir": str(tmp_path / "out")})
    plan = make_plan(config)
    trainable, _ = load_weights(config, plan.model)
    adapter, targets, options = trainable["adapter"], plan.model.targets, plan.model.lora
    save_adapter(tmp_path / "start", adapter, targets, options, base_name=config.base_model)
    wanted, norms = torch_losses(config, plan, tmp_path / "start")
    result = train(config, quiet=True)
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    difference = np.abs(np.array([record["loss"] for record in records]) - wanted).max()
    assert len(records) == STEPS
    assert wanted[0] - wanted[-1] > 100 * TOLERANCE, "nothing was learned"
    assert norms.min() < norms.max()
    assert norms.max() > CLIP, "clipping was never tried"
    assert difference <= TOLERANCE, difference
    ratios = np.array([record["grad_norm"] for record in records]) / norms
    assert np.abs(ratios - 1).max() <= 1e-2, ratios
