"""One line for each key that was read as something else, or has no effect."""

from collections.abc import Iterator

from jaxlora.config import derived
from jaxlora.config.keys import IMPLIED, MAPPED
from jaxlora.config.roles import is_live, no_effect
from jaxlora.config.schema import Config


def notes(config: Config) -> list[str]:
    """Returns what the user should know of the keys of the file; nothing here is an error."""
    topics = (_foreign, _data, _training, _tokens, _adapter, _quantization)
    return [line for topic in topics for line in topic(config)]


def _foreign(config: Config) -> Iterator[str]:
    for key, value in config.foreign.items():
        if is_live(key, value):
            yield f"{key}: {read_as(key) or f'no effect: {no_effect(key, value)}'}"


def read_as(key: str) -> str | None:
    """Returns what a key that is mapped or implies another is read as, else None.

    >>> read_as("dp_shard_size"), read_as("strict")
    ('read as mesh.fsdp', None)
    """
    if key == "tokens":
        return "a mapping is read as special_tokens"
    if key in MAPPED:
        return f"read as {'.'.join(MAPPED[key])}"
    if key not in IMPLIED:
        return None
    target, value, why = IMPLIED[key]
    return f"read as {target}: {str(value).lower()}{why and f'; {why}'}"


def _data(config: Config) -> Iterator[str]:
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(getattr(config, key)):
            if entry.preprocess_shards is not None:
                yield f"{key}[{i}].preprocess_shards: no effect: rows are never read all at once"
    if config.pretraining_dataset and not config.streaming:
        yield "pretraining_dataset: read as datasets of type completion, whole; see streaming"
    if config.evals_per_epoch and not derived.has_held_out(config):
        yield "evals_per_epoch: no effect: no data is held out (val_set_size, test_datasets)"


def _training(config: Config) -> Iterator[str]:
    name, canonical = config.optimizer, derived.optimizer(config)
    if any(bits in name for bits in derived.LOW_BITS) and name != canonical:
        bits = "8 bits" if canonical == "adamw_8bit" else "float32"
        yield f"optimizer: {name} is read as {canonical}; its states are kept in {bits}"
    elif "paged" in name:
        yield f"optimizer: {name} is read as {canonical}; its states stay on the device"
    if config.gradient_checkpointing == "offload_disk":
        yield "gradient_checkpointing: read as offload: to the host's memory, not to a disk"
    if (
        config.loss_watchdog_threshold is None
        and "loss_watchdog_patience" in config.model_fields_set
    ):
        yield "loss_watchdog_patience: no effect: loss_watchdog_threshold is not set"
    if config.nonfinite == "stop" and "nonfinite_limit" in config.model_fields_set:
        yield "nonfinite_limit: no effect: nonfinite is stop"
    if config.resume_from_checkpoint and config.auto_resume_from_checkpoints:
        yield "auto_resume_from_checkpoints: no effect: resume_from_checkpoint decides"


def _tokens(config: Config) -> Iterator[str]:
    special = config.special_tokens
    names = {special.bos_token, special.eos_token, special.pad_token, special.unk_token}
    for text in config.tokens:
        if text in names or text in special.additional_special_tokens:
            yield f"tokens: {text} is one of special_tokens already"
    learned = config.lora_modules_to_save or config.peft_trainable_token_indices
    if config.adapter and config.added_tokens_overrides and not learned:
        yield (
            "added_tokens_overrides: the rows of these tokens stay as they are; list their ids in "
            "peft_trainable_token_indices to train them"
        )


def _adapter(config: Config) -> Iterator[str]:
    if config.adapter is None:
        for key in sorted(config.model_fields_set):
            if key.startswith(("lora_", "loraplus_", "peft_")) and getattr(config, key):
                yield f"{key}: no effect: adapter is not set"
        return
    if config.unfrozen_parameters:
        yield "unfrozen_parameters: no effect: it matches no name beside an adapter, which trains"
    if config.peft_init_lora_weights is False:
        yield "peft_init_lora_weights: false is read as the default, as in Axolotl"
    if config.lora_model_dir and derived.lora_init(config) is not True:
        yield "peft_init_lora_weights: no effect: lora_model_dir is where the adapter starts"
    if config.lora_target_linear and config.lora_target_modules:
        yield "lora_target_modules: no effect: lora_target_linear adapts every linear layer"
    elif derived.lora_targets(config) == derived.DEFAULT_TARGETS != config.lora_target_modules:
        yield "lora_target_modules: not set, so q_proj and v_proj, PEFT's default"


def _quantization(config: Config) -> Iterator[str]:
    options, plan = config.bnb_config_kwargs, derived.quantization(config)
    if options.bnb_4bit_compute_dtype is not None:
        yield "bnb_config_kwargs.bnb_4bit_compute_dtype: no effect: bf16 sets the compute dtype"
    if options.bnb_4bit_quant_storage is not None:
        yield "bnb_config_kwargs.bnb_4bit_quant_storage: no effect: codes are stored as bytes"
    if "bnb_4bit_use_double_quant" in options.model_fields_set and (
        plan is None or plan.format != "nf4"
    ):
        yield "bnb_config_kwargs.bnb_4bit_use_double_quant: no effect: the base is not nf4"
