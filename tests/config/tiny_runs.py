"""One tiny QLoRA run, trained once for every test that only reads its folder."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import jaxlora

ASSETS = Path(jaxlora.__file__).parent / "assets"
PROMPT = {"field_instruction": "question", "field_output": "answer", "format": "{instruction}\n"}
# Widths that groups of 64 divide: the run stores its base as int4.
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
_STEPS = 3


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """A finished run; its folders are shared, so a test that changes one must copy it."""

    base: Path
    rows: Path
    folder: Path
    keys: dict[str, Any]


def write_base(write_tiny_llama: Any, folder: Path, **changes: Any) -> Path:
    """Writes a tiny model with the bundled tokenizer."""
    write_tiny_llama(folder, **{**SIZES, **changes})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "tiny-llama" / name, folder)
    return folder


def write_rows(path: Path, rows: int) -> Path:
    """Writes questions and answers as JSON lines."""
    rng = random.Random(0)
    words = "red green blue cat dog house river stone".split()
    with path.open("w") as file:
        for _ in range(rows):
            chosen = rng.choices(words, k=rng.randint(1, 5))
            record = {"question": " ".join(chosen), "answer": " ".join(chosen[::-1])}
            file.write(json.dumps(record) + "\n")
    return path


_made: list[TinyRun] = []


def tiny_run(tmp_path_factory: pytest.TempPathFactory, write_tiny_llama: Any) -> TinyRun:
    """Returns the run of this process; the first call trains it, in a few seconds."""
    if not _made:
        root = tmp_path_factory.mktemp("tiny-run")
        base = write_base(write_tiny_llama, root / "base")
        rows = write_rows(root / "rows.jsonl", 24)
        keys = {
            "base_model": str(base),
            "datasets": [{"path": str(rows), "type": PROMPT}],
            "dataset_prepared_path": str(root / "prepared"),
            "val_set_size": 4,
            "output_dir": str(root / "run"),
            "adapter": "qlora",
            "quantization": "int4",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            "sequence_len": 64,
            "micro_batch_size": 4,
            "learning_rate": 3e-2,  # three steps must leave a mark
            "max_steps": _STEPS,
            "logging_steps": 1,
            "seed": 7,
        }
        jaxlora.train(keys, quiet=True)
        _made.append(TinyRun(base, rows, root / "run", keys))
    return _made[0]
