"""What follows from several keys (Axolotl's derived values): pure functions of a `Config`."""

import dataclasses
import math

from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError

# Names with adamw in them that are other algorithms.
_NOT_ADAMW = ("galore", "apollo", "schedule_free", "grok", "adopt", "stable")
_LION = ("lion", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "flash_lion")
_NAMES = dict.fromkeys(_LION, "lion") | {
    "sgd": "sgd",
    "flash_sgd": "sgd",
    "adafactor": "adafactor",
    "muon": "muon",
}
# How names say that the states of an optimizer are not float32.
LOW_BITS = ("8bit", "4bit", "fp8")
OPTIMIZERS = ("adamw", "adamw_8bit", "lion", "sgd", "adafactor", "muon")

# PEFT's default for Llama and Mistral.
DEFAULT_TARGETS = ("q_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the frozen base is stored; `double_quant` concerns nf4."""

    format: str
    double_quant: bool


def canonical_optimizer(name: str) -> str | None:
    """Returns the one of `OPTIMIZERS` that an Axolotl or transformers name stands for, or None.

    >>> canonical_optimizer("adamw_bnb_8bit"), canonical_optimizer("galore_adamw")
    ('adamw_8bit', None)
    """
    if "adamw" in name and not any(other in name for other in _NOT_ADAMW):
        return "adamw_8bit" if any(bits in name for bits in LOW_BITS) else "adamw"
    return _NAMES.get(name)


def optimizer(config: Config) -> str:
    """Returns one of `OPTIMIZERS`."""
    name = canonical_optimizer(config.optimizer)
    assert name is not None, "the rules refuse other names"
    return name


def quantization(config: Config) -> Quantization | None:
    """Returns the format of the frozen base; None keeps it as loaded.

    `load_in_4bit` means nf4 with double quantization, as in Axolotl; `quantization` overrides it.
    Where neither speaks, LoftQ's bits do.
    """
    loftq = config.peft.loftq_config if config.adapter else None
    loaded = "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else None
    wanted = loftq and ("nf4" if loftq.loftq_bits == 4 else "int8")
    storage = config.quantization or loaded or wanted
    if storage is None:
        return None
    return Quantization(
        storage, storage == "nf4" and config.bnb_config_kwargs.bnb_4bit_use_double_quant
    )


def lora_targets(config: Config) -> tuple[str, ...] | str:
    """Returns names, one regular expression, or ``"all-linear"``."""
    if config.lora_target_linear:
        return "all-linear"
    return config.lora_target_modules or (() if config.lora_target_parameters else DEFAULT_TARGETS)


def lora_target_parameters(config: Config) -> tuple[str, ...]:
    """Returns names of weights that are no linear layers."""
    names = config.lora_target_parameters or ()
    return (names,) if isinstance(names, str) else names


def lora_init(config: Config) -> bool | str:
    """Returns how the adapter starts, in PEFT's words; false means the default, as in Axolotl."""
    loftq = config.peft.loftq_config is not None
    return config.peft_init_lora_weights or ("loftq" if loftq else True)


def matches_beside_adapter(pattern: str) -> bool:
    """Returns whether an entry of `unfrozen_parameters` can name a tensor beside an adapter.

    There, in Axolotl, all names begin with ``base_model.model.``.

    >>> matches_beside_adapter("lm_head"), matches_beside_adapter("^lm_head")
    (True, False)
    """
    return not pattern.startswith("^") or pattern.startswith("^base_model")


def remat_policy(config: Config) -> str:
    """Returns what the backward pass recomputes, a value of `remat`.

    Without a word about it, as little as the device has room for.
    """
    if config.remat is not None:
        return config.remat
    if "gradient_checkpointing" not in config.model_fields_set:
        return "auto"
    checkpoints = config.gradient_checkpointing
    if str(checkpoints).startswith("offload"):
        return "offload"
    return "full" if checkpoints else "none"


def attention_backend(config: Config) -> str:
    """Returns the implementation of attention that is asked for by name, or ``"auto"``."""
    name = config.attn_implementation
    if name == "eager":
        return "reference"
    return name if name in ("reference", "chunked", "cudnn", "splash") else "auto"


def compute_dtype(config: Config, platform: str) -> str:
    """Returns ``"bfloat16"`` or ``"float32"``; `platform` is JAX's: cpu, gpu or tpu."""
    wanted = platform != "cpu" if config.bf16 == "auto" else config.bf16
    return "bfloat16" if wanted else "float32"


def matmul_precision(config: Config) -> str | None:
    """Returns a value for `jax.default_matmul_precision`; None leaves JAX's default."""
    if config.tf32 == "auto":
        return None
    return "tensorfloat32" if config.tf32 else "float32"


def accumulation_steps(config: Config, replicas: int) -> int:
    """Returns forward passes per step; `replicas` is the product of the data and fsdp axes.

    Raises:
      UserError: if `batch_size` is not a multiple of the rows of one forward pass.
    """
    if config.batch_size is None:
        return config.gradient_accumulation_steps or 1
    rows = config.micro_batch_size * replicas
    if config.batch_size % rows:
        nearest = -(-config.batch_size // rows) * rows
        raise UserError(
            f"batch_size: {config.batch_size} is not a multiple of {rows} (micro_batch_size "
            f"{config.micro_batch_size} on {replicas} devices); use {nearest}"
        )
    return config.batch_size // rows


def eval_rows(config: Config) -> int:
    """Returns rows per device in evaluation."""
    return config.eval_batch_size or config.micro_batch_size


def eval_packing(config: Config) -> bool:
    """Returns whether evaluation packs several examples into a row."""
    packs = config.eval_sample_packing
    return config.sample_packing if packs is None else packs


def pads_to_sequence_len(config: Config) -> bool:
    """Returns whether every row is padded to `sequence_len`."""
    pads = config.pad_to_sequence_len
    return config.sample_packing if pads is None else pads


def has_held_out(config: Config) -> bool:
    """Returns whether there is data to evaluate on."""
    return bool(config.test_datasets) or config.val_set_size > 0


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Returns the optimizer steps of the run.

    With `max_steps` and `num_epochs`, whichever ends first.
    """
    epochs = config.num_epochs
    if epochs is None and config.max_steps is not None:
        return config.max_steps
    steps = max(math.ceil((epochs or 1) * steps_per_epoch), 1)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def warmup_steps(config: Config, total: int) -> int:
    """Returns the steps of linear warm-up in a run of `total` steps."""
    share = config.warmup_ratio
    if config.warmup_steps is not None:
        if not 0 < config.warmup_steps < 1:
            return int(config.warmup_steps)
        share = config.warmup_steps
    if share is not None:
        return math.ceil(share * total)
    return min(int(0.03 * total), 100)


def decay_steps(config: Config, total: int) -> int:
    """Returns the step at which the cosine reaches its floor, which then stays."""
    ratio = config.cosine_constant_lr_ratio
    return total if ratio is None else int(total * ratio)


def logging_steps(config: Config, total: int) -> int:
    """Returns the steps between two log lines."""
    return config.logging_steps or max(min(int(0.005 * total), 10), 1)


def save_every(config: Config, steps_per_epoch: int) -> int | None:
    """Returns the steps between two checkpoints; None saves only at the end."""
    return _every(
        config, steps_per_epoch, config.save_strategy, config.save_steps, config.saves_per_epoch
    )


def eval_every(config: Config, steps_per_epoch: int) -> int | None:
    """Returns the steps between two evaluations; None never evaluates during training."""
    if not has_held_out(config):
        return None
    return _every(
        config, steps_per_epoch, config.eval_strategy, config.eval_steps, config.evals_per_epoch
    )


def _every(
    config: Config,
    steps_per_epoch: int,
    strategy: str | None,
    steps: float | None,
    per_epoch: int | None,
) -> int | None:
    if strategy == "no" or (per_epoch == 0 and steps is None):
        return None
    total = total_steps(config, steps_per_epoch)
    if steps is not None:
        return int(steps) if steps >= 1 else max(math.ceil(steps * total), 1)
    # Axolotl spaces them over the run, so a max_steps that cuts the epochs short packs them closer.
    epochs = config.num_epochs or total / steps_per_epoch
    return max(math.ceil(total / ((per_epoch or 1) * epochs)), 1)


def uses_wandb(config: Config) -> bool:
    """Returns whether the run is logged to Weights & Biases."""
    if config.use_wandb is None:
        return config.wandb_project is not None
    return config.use_wandb
