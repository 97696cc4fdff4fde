"""The parts of a `Config` in the words of the lower floors."""

import dataclasses

from jaxlora.config import derived
from jaxlora.config.datasets import DatasetConfig, PromptFormat
from jaxlora.config.schema import Config
from jaxlora.data.new_tokens import NewTokens
from jaxlora.data.spec import DataOptions, DatasetSpec, Labels
from jaxlora.lora.config import LoraConfig

# What data and templates call the reasoning of a message, where neither says.
_THINKING = "reasoning_content"


def lora_config(config: Config) -> LoraConfig | None:
    """Returns the options of the adapter; None trains every weight."""
    if config.adapter is None:
        return None
    assert config.lora_r is not None, "the rules require it"
    assert config.lora_alpha is not None, "the rules require it"
    layers, loftq = config.peft_layers_to_transform, config.peft.loftq_config
    pattern = config.peft_layers_pattern
    return LoraConfig(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=derived.lora_targets(config),
        target_parameters=derived.lora_target_parameters(config),
        exclude_modules=config.lora_exclude_modules or (),
        rank_pattern=config.lora_rank_pattern,
        alpha_pattern=config.lora_alpha_pattern,
        layers_to_transform=(layers,) if isinstance(layers, int) else layers or (),
        layers_pattern=(pattern,) if isinstance(pattern, str) else pattern or (),
        modules_to_save=tuple(sorted(set(config.lora_modules_to_save))),
        trainable_token_indices=config.peft_trainable_token_indices,
        use_rslora=config.peft_use_rslora,
        use_dora=config.peft_use_dora,
        lora_bias=config.peft_lora_bias,
        train_bias=config.peft_bias,
        init=derived.lora_init(config),
        loftq_iter=loftq.loftq_iter if loftq else 1,
    )


def new_tokens(config: Config) -> NewTokens:
    """Returns what the run adds to its tokenizer."""
    special = config.special_tokens.model_dump(exclude_none=True)
    further = special.pop("additional_special_tokens")
    return NewTokens(special, tuple(further), config.tokens, config.added_tokens_overrides)


def train_specs(config: Config) -> tuple[DatasetSpec, ...]:
    """Returns the entries of `datasets`, then those of `pretraining_dataset`."""
    texts = (
        DatasetSpec(
            path=entry.path,
            type="completion",
            split=entry.split,
            data_files=entry.data_files,
            name=entry.name,
            field=entry.text_column,
        )
        for entry in config.pretraining_dataset
    )
    specs = (*map(_spec, config.datasets), *texts)
    return tuple(dataclasses.replace(spec, streaming=config.streaming) for spec in specs)


def held_out_specs(config: Config) -> tuple[DatasetSpec, ...]:
    """Returns the entries of `test_datasets`."""
    return tuple(map(_spec, config.test_datasets))


def mesh_sizes(config: Config) -> dict[str, int] | None:
    """Returns devices along each axis, None where the file leaves it to the devices there are."""
    return config.mesh.model_dump() if config.mesh.model_fields_set else None


def data_options(config: Config, labels: Labels | None = None, *, replicas: int = 1) -> DataOptions:
    """Returns how rows become examples, of these labels if they have any.

    Args:
      config: the keys.
      labels: those of a classifier.
      replicas: product of the data and fsdp axes; says how much of a stream the steps need.
    """
    needed = None
    if config.streaming and config.max_steps:
        rows = config.micro_batch_size * replicas * derived.accumulation_steps(config, replicas)
        needed = config.max_steps * rows
    packed, mixes = config.sample_packing, config.dataset_mixing_strategy == "interleave"
    sources = len(config.datasets) + len(config.pretraining_dataset)
    return DataOptions(
        sequence_len=config.sequence_len,
        train_on_inputs=config.train_on_inputs,
        sample_packing=config.sample_packing,
        sample_packing_sequentially=config.sample_packing_sequentially,
        eval_sample_packing=derived.eval_packing(config),
        val_set_size=config.val_set_size,
        seed=config.seed,
        pad_to_sequence_len=derived.pads_to_sequence_len(config),
        excess_length_strategy=config.excess_length_strategy,
        dataset_prepared_path=config.dataset_prepared_path,
        chat_template=config.chat_template_jinja or config.chat_template,
        eot_tokens=config.eot_tokens,
        shuffle=config.shuffle_merged_datasets,
        min_sample_len=config.min_sample_len,
        deduplicate=config.dataset_exact_deduplication,
        labels=labels,
        stream_examples=None if packed else needed,
        stream_tokens=needed * config.sequence_len if needed and packed else None,
        stream_weights=(config.mixing_weights or (1.0,) * sources) if needed and mixes else None,
        on_bad_row=config.on_bad_row,
        max_bad_rows=config.max_bad_rows,
    )


def _spec(entry: DatasetConfig) -> DatasetSpec:
    kind, mappings = entry.type, entry.message_property_mappings
    if entry.field_thinking or entry.template_thinking_key:
        theirs, ours = entry.field_thinking, entry.template_thinking_key
        mappings = {**mappings, ours or _THINKING: theirs or _THINKING}
    return DatasetSpec(
        path=entry.path,
        type=kind.model_dump(exclude_none=True) if isinstance(kind, PromptFormat) else kind,
        split=entry.split,
        data_files=entry.data_files,
        ds_type=entry.ds_type,
        shards=entry.shards or 1,
        shards_idx=entry.shards_idx,
        name=entry.name,
        revision=entry.revision,
        field=entry.field,
        field_pair=entry.field_pair,
        field_label=entry.field_label,
        field_messages=entry.field_messages,
        message_property_mappings=mappings,
        roles=entry.roles,
        roles_to_train=entry.roles_to_train,
        train_on_eos=entry.train_on_eos,
        train_on_eot=entry.train_on_eot,
        message_field_training=entry.message_field_training,
        message_field_training_detail=entry.message_field_training_detail,
        field_tools=entry.field_tools,
        split_thinking=entry.split_thinking,
        template_thinking_key=entry.template_thinking_key or _THINKING,
        drop_system_message=entry.drop_system_message,
        chat_template=entry.chat_template_jinja or entry.chat_template,
    )
