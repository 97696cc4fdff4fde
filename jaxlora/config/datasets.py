"""The nested mappings of a configuration: data sets, special tokens, mesh, bitsandbytes options."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from jaxlora.config.values import Count, Flag, Natural, Section, Size, Text, Whole
from jaxlora.data.spec import TOKENIZED, TYPES, expected_types

TYPE_ALIASES = {
    "chat_template.default": "chat_template",
    "messages": "chat_template",
    "messages.chat": "chat_template",
    "": TOKENIZED,
}
"""Another name of a type: ours."""

_SHAREGPT = (
    "Axolotl dropped it; write instead the three lines type: chat_template, "
    "field_messages: conversations, message_property_mappings: {role: from, content: value}"
)
_PREFERENCES = "preference and reward training are not available"
_TYPE_HINTS = {
    "sharegpt": _SHAREGPT,
    "sharegpt_simple": _SHAREGPT,
    "sharegpt_jokes": _SHAREGPT,
    "vicuna": f"{_SHAREGPT}, and a chat_template",
    "chat": "write type: chat_template",
    "user_defined": "write the fields of the prompt as a mapping under type",
    "pretrain": "use type: completion",
    "pretraining": "use type: completion",
    "bradley_terry": _PREFERENCES,
    "stepwise_supervised": _PREFERENCES,
    "dpo": _PREFERENCES,
    "kto": _PREFERENCES,
    "orpo": _PREFERENCES,
    "ebft": _PREFERENCES,
    "chatml": _PREFERENCES,
    "llama3": _PREFERENCES,
    "zephyr": _PREFERENCES,
    "passthrough": _PREFERENCES,
    "_synthetic": "synthetic data are not available; write a file",
}
"""Types of Axolotl, by the name before the first dot or colon, that are refused, and why."""


def _dataset_type(value: Any) -> Any:
    if value is None:
        return TOKENIZED
    if not isinstance(value, str):
        return value
    name = TYPE_ALIASES.get(value, value)
    base = name.split(":")[0].split(".")[0]
    if name not in TYPES and base in _TYPE_HINTS:
        raise ValueError(f"{value} is not supported: {_TYPE_HINTS[base]}")
    if name not in TYPES:
        raise ValueError(f"{value} is not known; expected {expected_types(value)}")
    return name


LEGACY_KEYS = {
    f"message_field_{name}": f"Read as message_property_mappings: {{{name}: ...}}."
    for name in ("role", "content")
}
"""Keys of a data set from before `message_property_mappings`: what they mean."""


class PromptFormat(Section):
    """A `type` spelled out, for data with a column of questions and one of answers."""

    field_instruction: Text = "instruction"
    """Column with the question."""
    field_output: Text = "output"
    """Column with the answer."""
    field_input: Text | None = None
    """Column with more context."""
    field_system: Text | None = None
    """Column with a system prompt."""
    system_prompt: str = ""
    """System prompt of rows without one."""
    system_format: str = "{system}"
    """How the system prompt is written."""
    format: str = "{instruction} {input}"
    """The prompt."""
    no_input_format: str | None = None
    """The prompt of a row without context; null: as `format`."""


class DatasetConfig(Section):
    """One entry of `datasets` or `test_datasets`."""

    path: Text
    """Local file or folder, or a hub id."""
    type: Annotated[
        Annotated[str, Field(json_schema_extra={"enum": list(TYPES)})] | PromptFormat,
        BeforeValidator(_dataset_type),
    ] = TOKENIZED
    """How a row becomes prompt and response (docs/data.md); without it rows are tokens already."""
    split: Text = "train"
    """Split of a hub data set."""
    name: Text | None = None
    """Configuration name of a hub data set."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set."""
    data_files: Text | tuple[Text, ...] | None = None
    """File or files inside `path` to read."""
    ds_type: Literal["json", "csv", "parquet", "text"] | None = None
    """Format of files whose names do not tell it."""
    shards: Size | None = None
    """Reads every `shards`-th row only."""
    shards_idx: Natural = 0
    """The row of every `shards` that is read, from 0."""
    preprocess_shards: Size | None = None
    """Accepted and not used: rows are never read all at once."""
    field: Text = "text"
    """Column with the text (`completion`, `classification`)."""
    field_pair: Text | None = None
    """(jaxlora) Column with a second text that belongs to the first (`classification`)."""
    field_label: Text = "label"
    """(jaxlora) Column with the label, a number from 0 or a name (`classification`)."""
    field_messages: Text = "messages"
    """Column with the conversation (`chat_template`)."""
    message_property_mappings: dict[str, str] = Field(
        default_factory=lambda: {"role": "role", "content": "content"}
    )
    """Names of a message's properties in the data."""
    roles: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {
            "system": ("system",),
            "user": ("user", "human"),
            "assistant": ("assistant", "gpt"),
            "tool": ("tool",),
        }
    )
    """Role of the template: the names it has in the data."""
    roles_to_train: tuple[str, ...] = ("assistant",)
    """Roles whose turns are trained."""
    train_on_eos: Literal["all", "turn", "last", "none"] = "turn"
    """Which end-of-turn tokens are trained: all, of trained turns, the last, none."""
    train_on_eot: Literal["all", "turn", "last", "none"] | None = None
    """The same for ends of turns that are not the eos_token; null: as `train_on_eos`."""
    message_field_training: Text | None = None
    """Key of a message that says whether it is trained, before its role does."""
    message_field_training_detail: Text | None = None
    """Key of a message with the characters to train: a list of begin_offset, end_offset, train."""
    field_tools: Text = "tools"
    """Column with the tools, a list or JSON text."""
    split_thinking: Flag = False
    """Reads reasoning between `<think>` and `</think>` of an answer as `template_thinking_key`."""
    field_thinking: Text | None = None
    """Key of a message with its reasoning; null: reasoning_content."""
    template_thinking_key: Text | None = None
    """What the chat template calls it; null: reasoning_content."""
    drop_system_message: Flag = False
    """Leaves out a system message at the start of a conversation."""
    chat_template: Text | None = None
    """Chat template of this data set; the top-level one otherwise."""
    chat_template_jinja: Text | None = None
    """Jinja text or file, with `chat_template: jinja`."""

    @model_validator(mode="before")
    @classmethod
    def _fold_legacy_message_fields(cls, raw: Any) -> Any:
        """Reads `message_field_role: from` as `message_property_mappings: {role: from}`."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        for key in LEGACY_KEYS:
            name, column = key.removeprefix("message_field_"), raw.pop(key, None)
            if column is not None:
                mappings = raw.get("message_property_mappings") or {}
                raw["message_property_mappings"] = {name: column, **mappings}
        return raw


class PretrainingDataset(Section):
    """One entry of `pretraining_dataset`."""

    path: Text
    """Local file or folder, or a hub id."""
    name: Text | None = None
    """Configuration name of a hub data set."""
    split: Text = "train"
    """Split of a hub data set."""
    text_column: Text = "text"
    """Column with the text."""
    data_files: Text | tuple[Text, ...] | None = None
    """File or files inside `path` to read."""
    type: Literal["pretrain", "completion"] = "pretrain"
    """Every token is trained."""
    skip: Literal[0] = 0
    """Not available; use split, for instance train[1000:]."""
    trust_remote_code: Flag = False
    """Accepted and not used: no code of others is ever run."""


class SpecialTokens(Section):
    """Names special tokens of the tokenizer; a text that it does not know becomes a new token."""

    bos_token: Text | None = None
    """Beginning of a sequence."""
    eos_token: Text | None = None
    """End of a sequence; trained at the end of every response."""
    pad_token: Text | None = None
    """Fills a row up; never trained."""
    unk_token: Text | None = None
    """Stands for what the tokenizer does not know."""
    additional_special_tokens: tuple[Text, ...] = ()
    """Further tokens that the text of a user can never contain."""


AxisSize = Annotated[Whole, Field(ge=-1, le=1_000_000)]


class MeshConfig(Section):
    """Devices on each axis; -1 takes the devices that are left.

    >>> MeshConfig(fsdp=4)
    MeshConfig(data=-1, fsdp=4, tensor=1, context=1, expert=1)
    """

    data: AxisSize = 1
    """Copies of the weights, each with its own rows."""
    fsdp: AxisSize = -1
    """Devices that share the weights and split the rows."""
    tensor: AxisSize = 1
    """Devices that split every matrix."""
    context: AxisSize = 1
    """Devices that split the tokens of every row; sequence_len must divide by it."""
    expert: AxisSize = 1
    """Devices that share the experts of a mixture and split the rows."""

    @model_validator(mode="before")
    @classmethod
    def _an_unnamed_axis_takes_the_rest(cls, raw: Any) -> Any:
        """Gives the devices that are left to fsdp, else to data, unless an axis asks for them."""
        if not isinstance(raw, dict) or -1 in raw.values():
            return {"fsdp": 1, **raw} if isinstance(raw, dict) else raw
        free = next((axis for axis in ("fsdp", "data") if raw.get(axis) is None), None)
        return {**raw, free: -1} if free else raw

    @model_validator(mode="after")
    def _at_most_one_axis_takes_the_rest(self) -> "MeshConfig":
        sizes = (self.data, self.fsdp, self.tensor, self.context, self.expert)
        if 0 in sizes:
            raise ValueError("an axis has 0 devices; use 1 for an unused axis")
        if sizes.count(-1) > 1:
            raise ValueError("only one axis may be -1 (the devices that are left)")
        return self


class BnbConfig(Section):
    """bitsandbytes' options that change the stored weights; the compute dtype follows `bf16`."""

    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    """4-bit code."""
    bnb_4bit_use_double_quant: Flag = True
    """Quantize the block scales too."""
    bnb_4bit_compute_dtype: Text | None = None
    """Accepted and not used: `bf16` sets the compute dtype."""
    bnb_4bit_quant_storage: Text | None = None
    """Accepted and not used: codes are stored as bytes."""


class LoftqConfig(Section):
    """LoftQ: the adapter starts as what quantization loses of the base."""

    loftq_bits: Literal[4, 8] = 4
    """Bits of the base; without another key that says how it is stored: nf4 or int8."""
    loftq_iter: Count = 1
    """(jaxlora) Rounds of quantizing and decomposing."""


class PeftConfig(Section):
    """PEFT's nested options."""

    loftq_config: LoftqConfig | None = None
    """Starts the adapter by LoftQ; see below."""
