"""The same run with transformers + PEFT (+ bitsandbytes) on the CPU, fed jaxlora's batches."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_scheduler

from jaxlora.config import derived
from jaxlora.data.batches import Batches
from jaxlora.training.setup import Plan

Batch = Mapping[str, np.ndarray]

# transformers' value for a token that is not trained.
IGNORED = -100


class Peer:
    """PEFT's side of a run.

    Args:
      plan: jaxlora's plan of the run; gives model folder, optimizer and schedule.
      adapter: PEFT folder with the adapter to start from.
      nf4: stores the base with bitsandbytes, as nf4 with double quantization.
      trim: cuts off columns that are padding in every row, as transformers' collators do.
      threads: torch's, set anew at every step.
    """

    def __init__(
        self, plan: Plan, adapter: Path, *, nf4: bool = False, trim: bool = True, threads: int = 1
    ):
        config, self.trim, self.threads = plan.config, trim, threads
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        base = AutoModelForCausalLM.from_pretrained(
            plan.model.folder,
            dtype=torch.float32,
            quantization_config=quantized if nf4 else None,
            trust_remote_code=False,
            use_cache=False,
        )
        self.model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        # Never eval(): there is no dropout to switch off, and a bitsandbytes layer that has seen
        # eval() on the CPU is packed for bfloat16 inference for good and gives wrong gradients.
        self.model.train()
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=derived.warmup_steps(config, plan.total_steps),
            num_training_steps=plan.total_steps,
        )

    def step(self, batch: Batch) -> float:
        """Takes one optimizer step; returns the mean loss in nats over the trained tokens."""
        torch.set_num_threads(self.threads)
        loss = self.model(**self._inputs(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self, batches: Batches) -> float:
        """Returns the mean loss in nats over every trained token, once each."""
        torch.set_num_threads(self.threads)
        loss_sum = tokens = 0.0
        for number in range(batches.steps_per_epoch):
            batch = batches.batch(number)
            here = float(batch["weights"].sum())
            loss_sum += self.model(**self._inputs(batch)).loss.item() * here
            tokens += here
        return loss_sum / tokens

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One example a row: plain causal attention with the padding masked is the same sum."""
        assert len(batch["tokens"]) == 1, "one micro-batch a step"
        tokens, targets, weights, segments = (
            batch[name][0] for name in ("tokens", "targets", "weights", "segment_ids")
        )
        assert segments.max() == 1, "one example a row"
        labels = np.full_like(tokens, IGNORED)
        # transformers predicts label t from token t - 1; our target t follows token t.
        labels[:, 1:] = np.where(weights[:, :-1] > 0, targets[:, :-1], IGNORED)
        stop = int(segments.any(axis=0).sum()) if self.trim else tokens.shape[1]
        return {
            "input_ids": torch.from_numpy(tokens[:, :stop].astype(np.int64)),
            "attention_mask": torch.from_numpy(segments[:, :stop].astype(np.int64)),
            "labels": torch.from_numpy(labels[:, :stop].astype(np.int64)),
        }
