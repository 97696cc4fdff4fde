"""Everything about a run that can be known, and refused, before weights are read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlora.checkpoints import hub
from jaxlora.checkpoints.adapter import LoadedAdapter, read_adapter
from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.fitted import fit
from jaxlora.checkpoints.label_head import optional_leaves
from jaxlora.checkpoints.load import check_weights, read_model_config, storage_of
from jaxlora.checkpoints.storage import Storage
from jaxlora.config import derived, settings
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.data.batches import Batches
from jaxlora.data.masking import Masking
from jaxlora.data.mixing import interleave
from jaxlora.data.prepare import Prepared, prepare
from jaxlora.data.spec import DataOptions, Labels
from jaxlora.data.table import check_vocabulary
from jaxlora.data.tokenizer import pad_id
from jaxlora.lora import LoraConfig, Target, changes_base
from jaxlora.lora.parts import Parts
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec
from jaxlora.models.task import task_of
from jaxlora.models.transformer import Transformer
from jaxlora.ops.arrays import FOUR_BIT
from jaxlora.parallel import processes
from jaxlora.parallel.mesh import batch_shards
from jaxlora.parallel.rules import Placement
from jaxlora.training.attention import attention_of
from jaxlora.training.host_memory import run_where_called
from jaxlora.training.labels import check_adapter, declared_names, labels_of_run, wanted_labels
from jaxlora.training.shape import adapter_options, shape_of_run
from jaxlora.training.vocabulary import (
    check_learned,
    open_tokenizer,
    rows_wanted,
    token_notes,
    tokenizer_folder,
)

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Model:
    """The base model of a run: where it is and what it is, without its weights.

    Attributes:
      folder: local folder with config.json, weights and tokenizer.
      stored: shape of the model in it.
      cfg: shape of the model that is trained: with new tokens, or a head of its own.
      targets: leaves with an adapter; empty in full fine-tuning.
      parts: leaves that train with all their numbers, whole or in part.
      lora: the adapter's options, None in full fine-tuning.
      start: the adapter to start from (`lora_model_dir`), None for a fresh one.
      notes: what the user should know of its tokens and its attention.
      label_names: what the labels of a classifier are called, if anything but the data says.
    """

    folder: Path
    stored: ModelConfig
    cfg: ModelConfig
    specs: dict[str, ParamSpec]
    tokenizer: Any
    fingerprint: str
    targets: dict[str, Target]
    parts: Parts
    lora: LoraConfig | None
    start: LoadedAdapter | None
    transformer: Transformer
    placement: Placement
    notes: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()

    @property
    def splits_base(self) -> bool:
        """Whether the adapter starts as a part of the base (PiSSA, OLoRA, LoftQ)."""
        return self.lora is not None and changes_base(self.lora.init)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run: model, data and the numbers that follow from both.

    `labels` are those of a classifier, None for a model of tokens.
    """

    config: Config
    model: Model
    data: Prepared
    batches: Batches
    eval_batches: Batches | None
    total_steps: int
    labels: Labels | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch


Settle = Callable[[Plan, Say], None]


def leave(plan: Plan, say: Say) -> None:
    """Decides nothing: `remat: auto` then keeps everything for the backward pass."""


def open_model(config: Config) -> Model:
    """Finds the base model, reads its description and matches the adapter's rules.

    Raises:
      UserError: missing or unsupported model, rules that match nothing, an oversized tokenizer.
    """
    folder = hub.resolve(config.base_model, config.revision_of_model)
    described = hub.resolve(config.base_model_config) if config.base_model_config else folder
    stored, raw = read_model_config(described)
    num_labels = wanted_labels(config, stored, raw)
    wanted = fit(stored, None, num_labels=num_labels)
    fingerprint, fresh = "", optional_leaves(stored, wanted)
    if not config.reinit_weights:
        _check_storage(config, storage_of(folder))
        fresh = check_weights(folder, wanted, fresh)
        fingerprint = base_fingerprint(folder)
    lora, start = adapter_options(config, wanted, fresh), None
    if lora is not None and config.lora_model_dir:
        start = read_adapter(
            hub.resolve(config.lora_model_dir), stored, fingerprint=fingerprint or None
        )
        lora = start.config
        check_adapter(config, start, num_labels)
    tokens = open_tokenizer(config, tokenizer_folder(config, folder, stored, start))
    rows = rows_wanted(config, stored, tokens, start)
    shape = shape_of_run(config, fit(stored, lora, rows, num_labels), lora, start, fresh)
    cfg, specs, parts = shape.cfg, shape.specs, shape.parts
    check_learned(config, stored, specs, tokens, (shape.targets, parts))
    return Model(
        folder,
        stored,
        cfg,
        specs,
        tokens.tokenizer,
        fingerprint,
        shape.targets,
        parts,
        lora,
        start,
        shape.transformer,
        shape.placement,
        (*token_notes(cfg, specs, tokens, parts), *shape.notes),
        declared_names(config, stored, raw, start),
    )


def _check_storage(config: Config, storage: Storage | None) -> None:
    """Refuses settings that contradict weights which are quantized in the files."""
    if storage is None:
        return
    if config.adapter is None:
        raise UserError(
            f"adapter: {config.base_model} is quantized ({storage.name}) and cannot be trained "
            "itself; set adapter: qlora or lora, or give the unquantized model."
        )
    lora = settings.lora_config(config)
    if lora is not None and not config.lora_model_dir and changes_base(lora.init):
        raise UserError(
            f"peft_init_lora_weights: {lora.init} takes the adapter out of the base, and "
            f"{config.base_model} is quantized already ({storage.name}); remove it, or give the "
            "unquantized model."
        )
    kwargs = config.bnb_config_kwargs
    asked = {
        "quantization": config.quantization,
        "load_in_4bit": config.load_in_4bit and "4-bit",
        "load_in_8bit": config.load_in_8bit and "8-bit",
        "bnb_4bit_quant_type": "bnb_4bit_quant_type" in kwargs.model_fields_set
        and kwargs.bnb_4bit_quant_type,
    }
    bits = "4-bit" if storage.format in FOUR_BIT else "8-bit"
    for key, value in asked.items():
        if value and value not in (storage.format, bits):
            raise UserError(
                f"{key}: {value} contradicts the weights of {config.base_model}, which are "
                f"quantized already ({storage.name}); remove {key} to use them as they are."
            )


def _objective(config: Config, model: Model) -> Masking | None:
    """How tokens are hidden, None where the next one is learned."""
    cfg, fitting = model.cfg, task_of(model.cfg).objective
    if config.objective not in (None, fitting):
        raise UserError(
            f"objective: {config.objective} does not fit {config.base_model} ({cfg.family}); "
            f"expected {fitting}."
        )
    if cfg.learned_positions and config.sequence_len > cfg.max_context:
        raise UserError(
            f"sequence_len: {config.sequence_len} is more than the {cfg.max_context} positions of "
            f"{config.base_model}; set it to {cfg.max_context} or less."
        )
    if fitting != "mlm":
        return None
    for entry in (*config.datasets, *config.test_datasets):
        if entry.type != "completion":
            raise UserError(
                f"datasets: {entry.path}: an encoder learns plain text; set type: completion."
            )
    return Masking.of(model.tokenizer, probability=config.mlm_probability, seed=config.seed)


def _mixed(config: Config, data: Prepared) -> NDArray[np.int64] | None:
    """The examples of an epoch, None for each of them once."""
    if config.dataset_mixing_strategy == "concatenate":
        return None
    seed = config.seed if config.shuffle_merged_datasets else None
    return interleave(data.counts, config.mixing_weights or None, config.mixing_stops, seed)


def _tells_texts_apart(model: Model) -> bool:
    """Whether the model is told of a second text, as transformers' tokenizer does or does not."""
    return model.cfg.token_types > 1 and "token_type_ids" in model.tokenizer.model_input_names


def _attend_to_rows(config: Config, model: Model, *batches: Batches | None) -> None:
    """How rows are packed decides how an attention kernel can keep their examples apart."""
    most = max(each.most_segments for each in batches if each is not None)
    dtype = model.transformer.dtype
    model.transformer.attend, _ = attention_of(config, model.cfg, dtype, model.placement, most)


def _prepared(config: Config, options: DataOptions, tokenizer: Any, say: Say) -> Prepared:
    """The data of a run, tokenized by one of its processes."""
    return processes.first_then_others(
        "data",
        lambda: prepare(
            settings.train_specs(config),
            settings.held_out_specs(config),
            options,
            tokenizer,
            progress=lambda rows, tokens: say(f"tokenized {rows:,} rows, {tokens:,} tokens"),
        ),
    )


def make_plan(config: Config, say: Say = lambda text: None) -> Plan:
    """Opens the model, prepares the data and derives the length of the run.

    Raises:
      UserError: anything wrong with the model's description, the data or their fit.
    """
    run_where_called()
    model = open_model(config)
    for note in model.notes:
        say(f"note: {note}")
    masking = _objective(config, model)
    labels = labels_of_run(config, model.cfg.num_labels, model.label_names)
    replicas = batch_shards(model.placement.mesh)
    options = settings.data_options(config, labels, replicas=replicas)
    data = _prepared(config, options, model.tokenizer, say)
    shared: dict[str, Any] = {
        "sequence_len": config.sequence_len,
        "seed": config.seed,
        "pad_id": pad_id(model.tokenizer),
        "pad": options.pad_to_sequence_len,
        "sequential": config.sample_packing_sequentially,
        "vocab_size": model.cfg.vocab_size,
        "masking": masking,
        "token_types": labels is not None and _tells_texts_apart(model),
    }
    check_vocabulary(data.train, model.cfg.vocab_size)
    batches = Batches(
        data.train,
        rows=config.micro_batch_size * replicas,
        accumulation=derived.accumulation_steps(config, replicas),
        packing=config.sample_packing,
        shuffle=config.shuffle_merged_datasets,
        examples=_mixed(config, data),
        **shared,
    )
    eval_batches = None
    if data.evaluation is not None:
        check_vocabulary(data.evaluation, model.cfg.vocab_size)
        eval_batches = Batches(
            data.evaluation,
            rows=derived.eval_rows(config) * replicas,
            packing=derived.eval_packing(config),
            shuffle=False,
            **shared,
        )
    _attend_to_rows(config, model, batches, eval_batches)
    total = derived.total_steps(config, batches.steps_per_epoch)
    return Plan(config, model, data, batches, eval_batches, total, labels)
