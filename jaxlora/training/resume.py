"""Continuing a run: which checkpoint, and whether it belongs to this configuration."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxlora.checkpoints import run_folder
from jaxlora.checkpoints.store import CheckpointStore, locate
from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig, changes_base
from jaxlora.parallel import processes
from jaxlora.training.nonfinite import Skipped
from jaxlora.training.remote_output import resume_path, working_folder
from jaxlora.training.setup import Plan
from jaxlora.training.shared_store import open_store
from jaxlora.training.state import TrainState, saved

CHECKPOINTS = "checkpoints"
_REMEDIES = {
    "rows_per_step": "set batch_size to what it was (rows on all devices), whatever their number"
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run starts.

    Attributes:
      continues: the output folder already belongs to this run.
      store: folder of checkpoints to restore from, None for a fresh start.
      step: the checkpoint, None for the newest good one.
    """

    continues: bool
    store: Path | None = None
    step: int | None = None


def find_origin(config: Config) -> Origin:
    """Reads `resume_from_checkpoint` and `auto_resume_from_checkpoints`.

    Raises:
      UserError: a checkpoint path that does not exist.
    """
    found = processes.on_first("origin", lambda: _as_json(_origin(config)))
    return Origin(found[0], found[1] and Path(found[1]), found[2])


def _as_json(origin: Origin) -> list[Any]:
    return [origin.continues, origin.store and str(origin.store), origin.step]


def _origin(config: Config) -> Origin:
    folder, wanted = working_folder(config), resume_path(config)
    own = Path(folder).expanduser().absolute() / CHECKPOINTS
    if isinstance(wanted, str):
        store, step = locate(wanted)
        if step is None and (store / CHECKPOINTS).is_dir():
            store = store / CHECKPOINTS
        if not CheckpointStore(store).steps():
            raise UserError(
                f"resume_from_checkpoint: {config.resume_from_checkpoint}: no checkpoint there."
            )
        return Origin(store == own, store, step)
    continues = bool(wanted)
    if config.auto_resume_from_checkpoints:
        continues = continues or run_folder.holds_run(folder)
    # A run killed before its first checkpoint continues from step 0 in its folder.
    has_checkpoint = continues and CheckpointStore(own).on_disk()
    return Origin(continues, own if has_checkpoint else None)


def identity(plan: Plan) -> dict[str, Any]:
    """Returns what must not change between a checkpoint and the run that continues it."""
    config, batches = plan.config, plan.batches
    storage = derived.quantization(config)
    return {
        "base_model": plan.model.fingerprint,
        "seed": config.seed,
        "mlm_probability": batches.masking and batches.masking.probability,
        "sequence_len": config.sequence_len,
        "sample_packing": config.sample_packing,
        "shuffle_merged_datasets": config.shuffle_merged_datasets and None,
        "dataset_mixing_strategy": None
        if config.dataset_mixing_strategy == "concatenate"
        else [config.mixing_stops, *config.mixing_weights],
        "rows_per_step": batches.rows * batches.accumulation,
        "total_steps": plan.total_steps,
        "optimizer": derived.optimizer(config),
        "mu_dtype": None if config.mu_dtype == "float32" else config.mu_dtype,
        "learning_rate": config.learning_rate,
        "lr_scheduler": config.lr_scheduler,
        "loraplus_lr_ratio": config.loraplus_lr_ratio,
        "loraplus_lr_embedding": config.loraplus_lr_ratio and config.loraplus_lr_embedding,
        "cosine_min_lr_ratio": config.cosine_min_lr_ratio,
        "cosine_constant_lr_ratio": config.cosine_constant_lr_ratio,
        "lr_quadratic_warmup": config.lr_quadratic_warmup or None,
        "warmup_steps": derived.warmup_steps(config, plan.total_steps),
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "max_grad_norm": config.max_grad_norm,
        "quantization": storage and [storage.format, storage.double_quant],
        "quantize_embeddings": config.quantize_embeddings,
        "peft_init_lora_weights": plan.model.lora and _init_of(plan.model.lora),
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "mean_resizing_embeddings": _resized(plan) and config.mean_resizing_embeddings,
        # Last: it follows from several of the keys above, which say better what has changed.
        "data": plan.data.fingerprint,
        "parts": {
            path: [part.layers and list(part.layers), part.rows and list(part.rows)]
            for path, part in plan.model.parts.items()
            if not part.whole
        },
        "scales": {path: list(target.scales) for path, target in plan.model.targets.items()},
    }


def _resized(plan: Plan) -> bool | None:
    """Whether the base has got rows for new tokens; None, as older checkpoints say, if not."""
    return plan.model.cfg.vocab_size != plan.model.stored.vocab_size or None


def _init_of(lora: LoraConfig) -> str | None:
    """How the adapter started, where that changed the base; nothing else depends on it later."""
    return str(lora.init) if changes_base(lora.init) else None


def restore(origin: Origin, plan: Plan, state: TrainState, store: CheckpointStore) -> TrainState:
    """Returns the state of the checkpoint `origin` names.

    Args:
      origin: from `find_origin`.
      plan: the run that continues.
      state: a fresh state: structure, shapes and shardings to restore into.
      store: the store this run saves to, which then knows where it stands.

    Raises:
      UserError: no good checkpoint, or one of a run with other settings, named.
    """
    assert origin.store is not None
    source = store if origin.store == store.folder else open_store(origin.store)
    restored, meta = source.restore(origin.step, saved(state))
    was, now = meta["identity"], identity(plan)
    for name in now:
        if was.get(name) != now[name]:
            raise UserError(
                f"resume_from_checkpoint: {name} was {was.get(name)!r} in the checkpoint and is "
                f"{now[name]!r} now; {_REMEDIES.get(name, 'put it back')}, or start anew in "
                "another output_dir."
            )
    return dataclasses.replace(
        state,
        trainable=restored["trainable"],
        opt_state=restored["optimizer"],
        step=meta["step"],
        skipped=Skipped(*meta.get("skipped", ())),
        initial=restored.get("initial", {}),
    )
