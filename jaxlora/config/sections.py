"""The top-level keys by subject, with Axolotl's names, defaults and meanings.

Each class is one heading of docs/configuration.md; `jaxlora.config.schema.Config` is their union,
and that of those in `run_sections`.
Keys marked (jaxlora) are ours; all others are Axolotl's.
"""

from typing import Annotated, Literal

from pydantic import Field

from jaxlora.config.datasets import (
    BnbConfig,
    DatasetConfig,
    PeftConfig,
    PretrainingDataset,
    SpecialTokens,
)
from jaxlora.config.values import (
    Flag,
    Natural,
    NotNegative,
    OpenShare,
    Positive,
    Section,
    Share,
    Size,
    Text,
    TokenId,
    Whole,
)


class ModelKeys(Section):
    """Model and tokenizer"""

    base_model: Text
    """Folder or hub id of the model to fine-tune, or a GGUF file."""
    base_model_config: Text | None = None
    """Folder or hub id of its config.json; `base_model` otherwise."""
    tokenizer_config: Text | None = None
    """Folder or hub id of its tokenizer; `base_model` otherwise."""
    revision_of_model: Text | None = None
    """Branch, tag or commit of a hub model."""
    special_tokens: SpecialTokens = Field(default_factory=SpecialTokens)
    """Names special tokens of the tokenizer; a text that it does not know becomes a new token."""
    tokens: tuple[Text, ...] = ()
    """New tokens; with an adapter, lora_modules_to_save must name embedding and head, or
    peft_trainable_token_indices the ids of the new tokens."""
    added_tokens_overrides: dict[TokenId, Text] = Field(default_factory=dict)
    """New texts, by id, of tokens that the tokenizer holds in reserve."""
    resize_token_embeddings_to_32x: Flag = False
    """Gives the embedding a multiple of 32 rows where new tokens make it grow."""
    mean_resizing_embeddings: Flag = False
    """Starts the rows of new tokens at the mean of the old ones; else they are random."""
    num_labels: Annotated[Whole, Field(ge=2, le=1_000_000)] | None = None
    """Labels of a classifier, for data of type classification; null: those of `base_model`. A base
    without a head of labels gets a fresh one, which trains whole."""
    label_names: tuple[Text, ...] = ()
    """(jaxlora) What the labels are called, in the order of their numbers; empty: as in
    `base_model`, else the names in the training data, sorted."""
    reinit_weights: Flag = False
    """Trains from random weights; only the configuration of `base_model` is read."""
    bf16: Flag | Literal["auto"] = "auto"
    """Computes in bfloat16; auto: on GPUs and TPUs."""
    tf32: Flag | Literal["auto"] = "auto"
    """Lets float32 products of a GPU use TF32; auto: the compiler's choice."""


class AdapterKeys(Section):
    """Adapter and quantization"""

    adapter: Literal["lora", "qlora"] | None = None
    """Method; null trains every weight."""
    lora_r: Size | None = None
    """Rank of the adapter; required with `adapter`."""
    lora_alpha: Positive | None = None
    """The adapter is scaled by alpha / r; required with `adapter`."""
    lora_dropout: OpenShare = 0.0
    """Share of the adapter's inputs dropped while training."""
    lora_target_modules: Text | tuple[Text, ...] | None = None
    """Names of the linear layers to adapt, or one regular expression for their full names."""
    lora_target_parameters: Text | tuple[Text, ...] | None = None
    """Weights to adapt that no linear layer holds, such as experts.gate_up_proj and gate.weight."""
    lora_target_linear: Flag = False
    """Adapts every linear layer but the output head."""
    lora_exclude_modules: Text | tuple[Text, ...] | None = None
    """Layers to leave out after all, by the same rules."""
    lora_rank_pattern: dict[str, Size] = Field(default_factory=dict)
    """Rank by regular expression for the end of a layer's full name; the first match wins."""
    lora_alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Alpha by the same."""
    lora_modules_to_save: tuple[Text, ...] = ()
    """Modules that train whole beside the adapter, by the end of their full names: embed_tokens,
    lm_head, norm and the like. They are saved with it, as PEFT's modules_to_save."""
    peft_trainable_token_indices: tuple[Natural, ...] | dict[str, tuple[Natural, ...]] = ()
    """Ids of tokens whose rows of the embedding (and of a tied head) train beside the adapter, or
    lists of them by table: embed_tokens, lm_head."""
    unfrozen_parameters: tuple[Text, ...] = ()
    """Without an adapter: regular expressions for the beginning of the names of the tensors that
    train, the rest being frozen; [start:end] after one trains only those rows."""
    lora_model_dir: Text | None = None
    """Folder of an adapter to start from."""
    peft_use_rslora: Flag = False
    """Scales by alpha / sqrt(r) (rsLoRA)."""
    peft_use_dora: Flag = False
    """Trains the magnitudes of the columns too (DoRA)."""
    peft_lora_bias: Flag = False
    """(jaxlora) Gives B a bias."""
    peft_bias: Literal["none", "lora_only", "all"] = "none"
    """(jaxlora) Biases of the base that train too: of adapted layers, or every one."""
    peft_layers_to_transform: Natural | tuple[Natural, ...] | None = None
    """Indices of the layers to adapt; null: all."""
    peft_layers_pattern: Text | tuple[Text, ...] | None = None
    """What comes before a layer's index in full names, such as layers or h; null: anything."""
    peft_init_lora_weights: Flag | Text | None = None
    """How the adapter starts: gaussian, orthogonal, pissa, pissa_niter_N, olora or loftq; else A is
    random and B zero. The exported adapter fits the plain base in any case."""
    peft: PeftConfig = Field(default_factory=PeftConfig)
    """PEFT's nested options."""
    load_in_4bit: Flag = False
    """Stores the frozen base as nf4, scales double quantized."""
    load_in_8bit: Flag = False
    """Stores the frozen base as int8."""
    quantization: Literal["int4", "nf4", "int8"] | None = None
    """(jaxlora) Format of the frozen base; int4 suits TPUs and CPUs."""
    quantize_embeddings: Literal["int8"] | None = None
    """(jaxlora) Format of a quantized base's embedding and head, each where it does not train;
    null keeps them as `bf16` says. A scale for each token."""
    bnb_config_kwargs: BnbConfig = Field(default_factory=BnbConfig)
    """Options of nf4."""


class DataKeys(Section):
    """Data"""

    datasets: tuple[DatasetConfig, ...] = ()
    """Training data."""
    pretraining_dataset: tuple[PretrainingDataset, ...] = ()
    """Plain text to train on, as `datasets` of type completion; streamed with `streaming`."""
    test_datasets: tuple[DatasetConfig, ...] = ()
    """Held-out data, instead of `val_set_size`."""
    val_set_size: NotNegative = 0.0
    """Held-out part of `datasets`: a share below 1, or a number of rows."""
    dataset_prepared_path: Text | None = None
    """Folder of the token cache; null: $JAXLORA_CACHE, else ~/.cache/jaxlora/datasets."""
    shuffle_merged_datasets: Flag = True
    """Mixes the rows of several data sets."""
    chat_template: Text | None = None
    """Name of a chat template, tokenizer_default, jinja, or a file; null: the tokenizer's own."""
    chat_template_jinja: Text | None = None
    """Jinja text or file, with `chat_template: jinja`."""
    eot_tokens: tuple[Text, ...] = ()
    """Tokens that end a turn of the chat template, where they are not the tokenizer's EOS."""
    dataset_exact_deduplication: Flag = False
    """Leaves out rows whose tokens an earlier row has; of held-out sets those of training too."""
    min_sample_len: Natural = 0
    """Leaves out examples with fewer tokens."""
    train_on_inputs: Flag = False
    """Trains the prompts too."""
    sequence_len: Annotated[Whole, Field(ge=2, le=10_000_000)] = 512
    """Tokens in a row."""
    excess_length_strategy: Literal["drop", "truncate", "split", "raise"] = "drop"
    """What becomes of an example longer than `sequence_len`; split (jaxlora): several examples."""
    streaming: Flag = False
    """Reads only as many rows as `max_steps` needs; evaluation data is read whole."""
    dataset_mixing_strategy: Literal["concatenate", "interleave"] = "concatenate"
    """Every row of `datasets` once in an epoch, or the shares of `mixing_weights`."""
    mixing_weights: tuple[Positive, ...] = ()
    """Share of each data set in an interleaved epoch, in any unit; empty: equal shares."""
    mixing_stops: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """(jaxlora) What ends an interleaved epoch: the first data set read whole, or all of them."""
    on_bad_row: Literal["error", "skip"] = "error"
    """(jaxlora) A row that cannot be used stops the run, or is left out and counted."""
    max_bad_rows: Share = 0.01
    """(jaxlora) Share of a data set's rows that `on_bad_row: skip` may leave out."""
    sample_packing: Flag = False
    """Puts several examples in a row; they do not see each other."""
    sample_packing_sequentially: Flag = False
    """Packs examples in their order rather than longest first."""
    eval_sample_packing: Flag | None = None
    """The same for evaluation; null: as `sample_packing`."""
    pad_to_sequence_len: Flag | None = None
    """Pads every row to `sequence_len`; null: as `sample_packing`."""
