"""A first configuration from three answers: model, data, hardware."""

import os
from collections.abc import Mapping
from typing import Any

import yaml

from jaxlora.config.document import Dumper
from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.data.sources import is_local, rows
from jaxlora.data.spec import DatasetSpec

_QLORA_NF4 = "adapter: qlora\nload_in_4bit: true         # the frozen base in nf4"
_QLORA_INT4 = "adapter: qlora\nquantization: int4         # the frozen base in 4 bits"
_LORA = "adapter: lora              # the frozen base as it is"

# Name: adapter, sequence_len, micro_batch_size, gradient_accumulation_steps.
HARDWARE: Mapping[str, tuple[str, int, int, int]] = {
    "cpu": (_QLORA_INT4, 256, 1, 8),
    "gpu-16gb": (_QLORA_NF4, 1024, 1, 16),
    "gpu-24gb": (_QLORA_NF4, 2048, 2, 8),
    "gpu-80gb": (_LORA, 4096, 2, 8),
    "tpu": (_LORA, 2048, 1, 8),
}
"""What there is to train on."""

QUESTIONS: Mapping[str, str] = {
    "model": "Base model (folder or hub id)",
    "data": "Training data (file, folder or hub id)",
    "hardware": f"Hardware ({', '.join(HARDWARE)})",
}
"""Answer that `write` wants: the question."""

# Columns that rows must have: how a data set of such rows is written.
_KINDS: Mapping[tuple[str, ...], str] = {
    ("messages",): "type: chat_template",
    ("conversations",): "type: chat_template\n    field_messages: conversations",
    ("instruction", "output"): "type: alpaca",
    ("segments",): "type: input_output\n",
    ("text",): "type: completion         # every token is trained",
}
_PAIRS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("input", "output"),
)
_SHAREGPT = "\n    message_property_mappings: {role: from, content: value}"
_ON_THE_HUB = "type: chat_template      # or alpaca, completion: see the rows on the hub"

_TEXT = """# Command: jaxlora train {file}
# Check:   jaxlora config check {file}; every key is in docs/configuration.md
base_model: {model}
datasets:
  - path: {data}
    {kind}
val_set_size: 0.05         # share of the rows that is held out
output_dir: {output}

{adapter}
lora_r: 16                 # more learns more and takes more memory
lora_alpha: 32
lora_target_linear: true   # adapts every linear layer

sequence_len: {length}
sample_packing: true       # several examples in a row
micro_batch_size: {rows}        # rows per device and forward pass; lower it if memory runs out
gradient_accumulation_steps: {accumulation}
gradient_checkpointing: true
num_epochs: 1
learning_rate: 2e-4
warmup_ratio: 0.03
evals_per_epoch: 4
saves_per_epoch: 1
"""


def write(file: str, *, model: str, data: str, hardware: str) -> None:
    """Writes a new configuration file.

    Raises:
      UserError: an answer that cannot be used, or a file that is there already.
    """
    text = starter(file, model=model, data=data, hardware=hardware)
    try:
        with open(file, "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"{file}: is already there; choose another name") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def starter(file: str, *, model: str, data: str, hardware: str) -> str:
    """Returns a commented configuration.

    Raises:
      UserError: an answer that cannot be used.
    """
    if hardware not in HARDWARE:
        known = ", ".join(HARDWARE)
        near = did_you_mean(hardware, HARDWARE)
        raise UserError(f"init: hardware {hardware!r} is not known; expected {known}.{near}")
    for name, answer in (("model", model), ("data", data)):
        if not answer:
            raise UserError(f"init: no {name} was given: {QUESTIONS[name]}")
    adapter, length, micro_rows, accumulation = HARDWARE[hardware]
    stem = os.path.splitext(os.path.basename(file))[0]
    return _TEXT.format(
        file=file,
        model=_scalar(model),
        data=_scalar(data),
        kind=_kind(data).rstrip(),
        output=_scalar(f"outputs/{stem}"),
        adapter=adapter,
        length=length,
        rows=micro_rows,
        accumulation=accumulation,
    )


def _kind(data: str) -> str:
    """Returns the type of a data set and its options, from the first row of a local one."""
    spec = DatasetSpec(data)
    if not is_local(spec):
        return _ON_THE_HUB
    _, row = next(iter(rows(spec)), ("", {}))
    for columns, kind in _KINDS.items():
        if set(columns) <= row.keys():
            return kind + (_SHAREGPT if _is_sharegpt(row.get(columns[0])) else "")
    for question, answer in _PAIRS:
        if {question, answer} <= row.keys():
            names = f"field_instruction: {question}, field_output: {answer}"
            return f'type: {{{names}, format: "{{instruction}}"}}'
    found = ", ".join(map(str, row)) or "no row"
    raise UserError(
        f"init: {data}: its columns ({found}) tell no type; expected messages, conversations, "
        "instruction and output, segments, text, or a question and an answer"
    )


def _is_sharegpt(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else {}
    return isinstance(first, dict) and {"from", "value"} <= first.keys()


def _scalar(text: str) -> str:
    return yaml.dump(text, Dumper=Dumper, width=10_000).removesuffix("...\n").strip()
