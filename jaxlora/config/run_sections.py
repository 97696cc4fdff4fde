"""The top-level keys of training, output, evaluation and logging; see `sections`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from jaxlora.config.datasets import (
    MeshConfig,
)
from jaxlora.config.values import (
    Count,
    Flag,
    Implementation,
    Natural,
    NotNegative,
    Number,
    OpenShare,
    Positive,
    Section,
    Share,
    Size,
    Strategy,
    Text,
)


class TrainingKeys(Section):
    """Training"""

    objective: Literal["clm", "mlm", "classification"] | None = None
    """(jaxlora) Learns the next token (clm), hidden ones (mlm) or labels (classification); null: as
    the model does."""
    mlm_probability: Annotated[Number, Field(gt=0, lt=1)] = 0.15
    """(jaxlora) Share of the tokens to guess: 80 % masked, 10 % replaced, 10 % left as they are."""
    micro_batch_size: Size = 1
    """Rows per device and forward pass."""
    gradient_accumulation_steps: Size | None = None
    """Forward passes per step; null: 1, or what `batch_size` asks."""
    batch_size: Size | None = None
    """Rows per step on all devices, instead of `gradient_accumulation_steps`."""
    num_epochs: Positive | None = None
    """Passes over the data; null: 1, or what `max_steps` asks."""
    max_steps: Count | None = None
    """Steps; with `num_epochs`, whichever ends first."""
    learning_rate: Positive = Field(le=10)
    """Highest learning rate."""
    loraplus_lr_ratio: Positive | None = None
    """Multiplies the learning rate of B (LoRA+); 16 is a common value."""
    loraplus_lr_embedding: Positive = 1e-6
    """Learning rate of adapters on embeddings, with `loraplus_lr_ratio`."""
    optimizer: Text = "adamw_torch_fused"
    """Any adamw name, lion, sgd, adafactor or muon."""
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    cosine_min_lr_ratio: Share | None = None
    """Share of `learning_rate` at which the cosine ends; null: 0."""
    cosine_constant_lr_ratio: Share | None = None
    """Share of the run after which the rate stays at `cosine_min_lr_ratio`."""
    lr_quadratic_warmup: Flag = False
    """Squares the share of the warm-up (cosine)."""
    warmup_steps: NotNegative | None = None
    """Steps of linear warm-up, or a share of the run below 1; null: 3 % of it, 100 at most."""
    warmup_ratio: Share | None = None
    """The same as a share of the run."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    adam_beta1: OpenShare = 0.9
    """Decay of the gradient's mean."""
    adam_beta2: OpenShare = 0.999
    """Decay of the gradient's square."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of the square."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """(jaxlora) Dtype in which adamw, lion and muon keep the mean of the gradient between steps:
    6 bytes a trained number instead of 8 with adamw."""
    max_grad_norm: NotNegative = 1.0
    """Longer gradients are clipped to this norm; 0: never."""
    gradient_checkpointing: Flag | Literal["full", "offload", "offload_disk"] = False
    """Recomputes activations in the backward pass to save memory (`remat: full`); offload keeps the
    inputs of layers in host memory meanwhile. Not given: `remat: auto`."""
    remat: Literal["auto", "none", "matmuls", "attention", "full", "offload"] | None = None
    """(jaxlora) What is recomputed: nothing; what is cheap (matmuls); the MLP too (attention); all;
    all, with the inputs of layers in host memory (offload). auto: as little as fits the device, by
    compiling; on a CPU at least what is cheap. null: as `gradient_checkpointing` says, auto if it
    says nothing."""
    attn_implementation: Implementation = "auto"
    """Attention: reference (all scores at once, also eager), chunked, cudnn (NVIDIA GPUs) or splash
    (TPUs); auto and Axolotl's other names: the fastest that device and model allow."""
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    """(jaxlora) Devices on each axis."""
    seed: Natural = 42
    """Seed of the order of the data, the dropout and the new weights."""


class RunKeys(Section):
    """Output, evaluation and logging"""

    output_dir: Text = "./model-out"
    """Folder of the run, or an address of object storage."""
    save_strategy: Strategy | None = None
    """When to save; no: only at the end."""
    saves_per_epoch: Natural | None = None
    """Checkpoints in an epoch; null: 1."""
    save_steps: Positive | None = None
    """Steps between checkpoints, or a share of the run below 1."""
    save_total_limit: Count = 4
    """Checkpoints kept; older ones are deleted."""
    eval_strategy: Strategy | None = None
    """When to evaluate on held-out data."""
    evals_per_epoch: Natural | None = None
    """Evaluations in an epoch; null: 1 where there is held-out data."""
    eval_steps: Positive | None = None
    """Steps between evaluations, or a share of the run below 1."""
    eval_batch_size: Size | None = None
    """Rows per device in evaluation; null: `micro_batch_size`."""
    eval_exact_match: Flag = False
    """(jaxlora) Generates answers to held-out prompts before and after, and counts exact ones."""
    eval_max_new_tokens: Size = 128
    """Longest generated answer, in tokens."""
    loss_watchdog_threshold: Positive | None = None
    """Training loss that means failure: the run ends, and what it has is saved and exported."""
    loss_watchdog_patience: Count = 3
    """Steps in a row above `loss_watchdog_threshold` that end it."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """(jaxlora) A loss or gradient that is not finite ends the run, or that step is left out."""
    nonfinite_limit: Count = 10
    """(jaxlora) Steps in a row that `nonfinite: skip` may leave out."""
    stall_timeout: NotNegative = 1800
    """(jaxlora) Seconds without a sign of life, compilation aside, that end a run; 0: never."""
    early_stopping_patience: Count | None = None
    """Held-out losses in a row, none below the lowest, that end the run; null: it goes on."""
    logging_steps: Count | None = None
    """Steps between log lines; null: 0.5 % of the run, 1 to 10."""
    resume_from_checkpoint: Flag | Text | None = None
    """Checkpoint folder to continue, or true for the newest of `output_dir`."""
    auto_resume_from_checkpoints: Flag = False
    """Continues the newest checkpoint of `output_dir` if there is one."""
    use_wandb: Flag | None = None
    """Logs to Weights & Biases; null: if `wandb_project` is set."""
    wandb_project: Text | None = None
    """Project."""
    wandb_entity: Text | None = None
    """User or team."""
    wandb_name: Text | None = None
    """Name of the run."""
    wandb_run_id: Text | None = None
    """Id of the run."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Where Weights & Biases writes; null: its own choice."""
    use_tensorboard: Flag = False
    """Logs to TensorBoard in `output_dir`."""
    foreign: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Keys of the file that jaxlora knows and does not act on, as written."""
