"""A tiny base model with the bundled tokenizer, a few dozen rows, and runs over them."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxlora
from jaxlora.checkpoints.save import save_model
from jaxlora.config.load import load_config
from jaxlora.data.batches import Batches
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import init_params
from jaxlora.training.loop import train
from jaxlora.training.results import TrainResult

TOKENIZER = Path(jaxlora.__file__).parent / "assets" / "tiny-llama"
VOCABULARY = 1 + max(
    json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"].values()
)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
PROMPT = {"field_instruction": "question", "field_output": "answer", "format": "{instruction}\n"}


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Most runs here compile the same programs; a cache on disk saves half the time."""
    before = {
        "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
        "jax_persistent_cache_min_compile_time_secs": (
            jax.config.jax_persistent_cache_min_compile_time_secs
        ),
    }
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    """Writes questions and answers of different lengths as JSON lines."""
    rng = random.Random(seed)
    words = "red green blue cat dog house river stone seven eight".split()
    with path.open("w") as file:
        for _ in range(rows):
            chosen = rng.choices(words, k=rng.randint(1, 6))
            record = {"question": "Turn: " + " ".join(chosen), "answer": " ".join(chosen[::-1])}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session", name="write_rows")
def write_rows_fixture():
    """Returns `write_rows`, for data of a test's own."""
    return write_rows


@pytest.fixture(scope="session")
def write_base(write_tiny_llama) -> Callable[..., Path]:
    """``write_base(folder, **changes)``: a tiny model with the bundled tokenizer."""

    def write(folder: Path, **changes: Any) -> Path:
        write_tiny_llama(folder, **{**SIZES, "head_dim": 16, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TOKENIZER / name, folder)
        return folder

    return write


WORDS = "the cat dog house river stone is was in on red green blue big small and".split()
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def _write_encoder(folder: Path, architecture: str = "BertForMaskedLM", **changes: Any) -> Path:
    """Writes a tiny encoder that has learned nothing, with a WordPiece tokenizer of `WORDS`."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*_SPECIAL.values(), *WORDS])}
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(tokenizer_object=pieces, **_SPECIAL).save_pretrained(folder)
    config = {
        "architectures": [architecture],
        "model_type": architecture.partition("For")[0].lower(),
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **changes,
    }
    cfg = read_config(config)
    params = init_params(dataclasses.replace(cfg, init_std=0.1), jax.random.key(0), "float32")
    save_model(params, cfg, folder, config=config)
    return folder


@pytest.fixture(scope="session")
def write_encoder() -> Callable[..., Path]:
    """``write_encoder(folder, architecture, **changes to config.json)``."""
    return _write_encoder


@pytest.fixture(scope="session")
def base(tmp_path_factory, write_base) -> Path:
    """The tiny model every run shares; do not write into it."""
    return write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """30 rows; do not write into it."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 30)


@pytest.fixture(scope="session")
def keys(base, rows, tmp_path_factory) -> dict[str, Any]:
    """The keys of a LoRA run of 6 steps, less its output folder."""
    return {
        "base_model": str(base),
        "datasets": [{"path": str(rows), "type": PROMPT}],
        "dataset_prepared_path": str(tmp_path_factory.mktemp("prepared")),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 64,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }


@pytest.fixture
def run(keys, tmp_path) -> Callable[..., TrainResult]:
    """``run(name, **keys) -> TrainResult``: trains into ``tmp_path/name``; None drops a key."""

    def start(name: str = "run", **changes: Any) -> TrainResult:
        values = {**keys, "output_dir": str(tmp_path / name), **changes}
        values = {key: value for key, value in values.items() if value is not None}
        return train(load_config(values), quiet=True)

    return start


@pytest.fixture
def crash_at(monkeypatch) -> Callable[..., None]:
    """``crash_at(step, error)``: making that batch (from 0) raises, until ``crash_at(None)``."""
    make = Batches.batch

    def set_crash(step: int | None, error: BaseException | None = None) -> None:
        def batch(self: Batches, number: int, rows: Any = None) -> Any:
            if number == step and self.shuffle:  # only training shuffles
                raise error or RuntimeError("deliberate")
            return make(self, number, rows)

        monkeypatch.setattr(Batches, "batch", batch)

    return set_crash


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    """``metrics_of(folder)``: the records of a run, less what depends on the clock."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in records]

    return read
