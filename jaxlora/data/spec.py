"""What a data set is and how its rows become examples: plain values, checked at birth."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.chat_types import CHATS
from jaxlora.data.instructions import INSTRUCTIONS

TOKENIZED = "tokenized"
"""The type of rows that are tokens already: an entry without a type."""
_OTHERS = ("chat_template", "classification", "completion", "input_output", TOKENIZED)
TYPES = (*INSTRUCTIONS, *CHATS, *_OTHERS)
DEFAULT_ROLES: dict[str, tuple[str, ...]] = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant"),
    "system": ("system",),
    "tool": ("tool",),
}

_UNSET = {"train_on_eos": (), "train_on_eot": (None,)}


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of `datasets:` or `test_datasets:`.

    Of its rows every `shards`-th is read, from row `shards_idx` on. `ds_type` is the format of
    files whose names do not tell it. `streaming` is for data too large to read whole. `type` is
    one of `TYPES`, or a mapping of `prompts.CustomPrompt`'s fields for any other two-column data.
    `field` is the text column of `completion` and `classification`; `field_pair` that of a second
    text, `field_label` that of the label. `roles` maps our role to the words the file uses for it.
    """

    path: str
    type: str | Mapping[str, Any] = "alpaca"
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    ds_type: str | None = None
    streaming: bool = False
    shards: int = 1
    shards_idx: int = 0
    name: str | None = None
    revision: str | None = None
    field: str | None = None
    field_pair: str | None = None
    field_label: str = "label"
    field_messages: str = "messages"
    message_property_mappings: Mapping[str, str] | None = None
    roles: Mapping[str, tuple[str, ...]] | None = None
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_eos: Literal["all", "turn", "last", "none"] = "turn"
    train_on_eot: Literal["all", "turn", "last", "none"] | None = None
    message_field_training: str | None = None
    message_field_training_detail: str | None = None
    field_tools: str = "tools"
    split_thinking: bool = False
    template_thinking_key: str = "reasoning_content"
    chat_template: str | None = None
    drop_system_message: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.shards_idx < self.shards:
            raise UserError(
                f"datasets: shards_idx {self.shards_idx} of {self.path} is not one of its "
                f"{self.shards} shards; expected 0 to {self.shards - 1}."
            )
        if isinstance(self.type, str) and self.type not in TYPES:
            raise UserError(
                f'datasets: type "{self.type}" of {self.path} is not known; '
                f"expected {expected_types(self.type)}"
            )
        for name in ("train_on_eos", "train_on_eot"):
            if getattr(self, name) not in ("all", "turn", "last", "none", *_UNSET[name]):
                raise UserError(
                    f'datasets: {name} "{getattr(self, name)}" of {self.path} is not known; '
                    "expected all, turn, last or none."
                )

    @property
    def chat(self) -> "DatasetSpec | None":
        """The data set with all that the name of its type says, if it holds conversations."""
        if self.type == "chat_template":
            return self
        settings = CHATS.get(self.type) if isinstance(self.type, str) else None
        if settings is None:
            return None
        return dataclasses.replace(self, type="chat_template", **settings)


def expected_types(given: str) -> str:
    """The types in the words of an error, with the one that was probably meant."""
    main = [name for name in TYPES if not set(name) & set(":.")]
    return f"one of {', '.join(main)}, or a mapping.{did_you_mean(given, TYPES)}"


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier: how many, and what they are called (nothing: by number)."""

    count: int
    names: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        """A name for each.

        >>> Labels(2).shown, Labels(2, ("ham", "spam")).shown
        (('0', '1'), ('ham', 'spam'))
        """
        return self.names or tuple(map(str, range(self.count)))


@dataclass(frozen=True)
class DataOptions:
    """How rows of every data set become examples; lengths are in tokens.

    `val_set_size` below 1 is the share of the rows held out, from 1 on their number. `deduplicate`
    leaves out rows whose tokens an earlier row has, in held-out data those of training data too.
    `labels` are those of data sets of type `classification`. A row that cannot be used is an
    error, or skipped while at most `max_bad_rows` of a data set's are bad. Training data is read
    until it has given `stream_examples` or `stream_tokens`: all data sets in their order, or with
    `stream_weights` each its share.
    """

    sequence_len: int
    train_on_inputs: bool = False
    sample_packing: bool = False
    sample_packing_sequentially: bool = False
    eval_sample_packing: bool | None = None
    val_set_size: float = 0.0
    seed: int = 42
    pad_to_sequence_len: bool = False
    excess_length_strategy: Literal["drop", "truncate", "split", "raise"] = "drop"
    dataset_prepared_path: str | None = None
    chat_template: str | None = None
    eot_tokens: tuple[str, ...] = field(default=())
    shuffle: bool = True
    min_sample_len: int = 0
    deduplicate: bool = False
    labels: Labels | None = None
    stream_examples: int | None = None
    stream_tokens: int | None = None
    stream_weights: tuple[float, ...] | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    max_bad_rows: float = 0.01

    def __post_init__(self) -> None:
        if self.sequence_len < 2:
            raise UserError(f"sequence_len: {self.sequence_len} is too short; expected 2 or more.")
        if self.val_set_size < 0:
            raise UserError(f"val_set_size: {self.val_set_size} is negative; expected 0 or more.")
        if self.val_set_size >= 1 and self.val_set_size != int(self.val_set_size):
            raise UserError(
                f"val_set_size: {self.val_set_size} is neither a share below 1 nor a whole number "
                "of rows."
            )
        if self.on_bad_row not in ("error", "skip") or not 0 <= self.max_bad_rows <= 1:
            raise UserError(
                f'on_bad_row: "{self.on_bad_row}" with max_bad_rows {self.max_bad_rows}; expected '
                "error or skip, and a share of the rows from 0 to 1."
            )
        if self.excess_length_strategy not in ("drop", "truncate", "split", "raise"):
            raise UserError(
                f'excess_length_strategy: "{self.excess_length_strategy}" is not known; '
                "expected drop, truncate, split or raise."
            )
