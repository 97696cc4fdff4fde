"""The real data of `real_data.py` as configurations: E2E (mr -> ref) and Alpaca instructions."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError

MODEL = "tinystories-656k"
E2E_ZIP = "e2e/e2e-dataset.zip"
ALPACA = "instructions/alpaca_en_demo.json"
E2E_TRAIN_ROWS, E2E_HELD_OUT_ROWS = 4000, 200

# One recipe for every method: what differs between two runs is only what the table names.
RECIPE: Mapping[str, Any] = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "lora_dropout": 0.0,  # the random streams of two frameworks differ
    "learning_rate": 5e-3,
    "lr_scheduler": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "sample_packing": False,  # plain padding, which the other side has too
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"adapter": "lora"},
    "nf4": {"adapter": "qlora", "load_in_4bit": True},
    "int4": {"adapter": "qlora", "load_in_4bit": True, "quantization": "int4"},
}


def e2e(data: Path, work: Path) -> dict[str, Any]:
    """Returns the keys of a run on the first training rows; held out: rows all over devset.csv.

    The file is sorted by meaning representation, so its first rows are all alike.
    """
    held_out = _csv_rows(data, "devset.csv")
    every = len(held_out) // E2E_HELD_OUT_ROWS
    kind = {"field_instruction": "mr", "field_output": "ref", "format": "{instruction}\n"}

    def entry(name: str, rows: list[dict[str, str]]) -> dict[str, Any]:
        path = work / f"e2e-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), "type": kind}

    return {
        "datasets": [entry("train", _csv_rows(data, "trainset.csv")[:E2E_TRAIN_ROWS])],
        "test_datasets": [entry("held-out", held_out[::every][:E2E_HELD_OUT_ROWS])],
        "sequence_len": 256,
        "micro_batch_size": 16,
        "num_epochs": 1,
    }


def _csv_rows(data: Path, name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(data / E2E_ZIP) as archive, archive.open(f"e2e-dataset/{name}") as file:
        return list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))


def alpaca(data: Path, work: Path) -> dict[str, Any]:
    """Returns the keys of a run on the instructions that fit the model's 512 positions."""
    return {
        "datasets": [{"path": str(data / ALPACA), "type": "alpaca"}],
        "val_set_size": 0.1,
        "sequence_len": 512,
        "micro_batch_size": 8,
        "num_epochs": 2,
    }


TASKS: Mapping[str, Callable[[Path, Path], dict[str, Any]]] = {"e2e": e2e, "alpaca": alpaca}


def check_data(data: Path) -> None:
    """Checks that the folder holds the model and both data sets.

    Raises:
      UserError: one of them is missing.
    """
    for name in (f"{MODEL}/config.json", E2E_ZIP, ALPACA):
        if not (data / name).is_file():
            raise UserError(f"--data: {data / name} is missing; give the folder of real inputs.")
