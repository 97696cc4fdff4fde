"""What `train_step.py` measures: models, batches and methods, and their inputs on disk."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 32000
RANK = 16
TOKENS = 1024  # of the tokenizer; the embedding has more rows, as padded ones do
SEED = 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
      width, layers, heads, hidden: of the Llama.
      rows, length: of a batch, in examples and tokens; every example is full.
      dtype: of weights and activations.
      method: "lora" (rank 16 on all linear layers) or "full".
      remat: jaxlora recomputes, the peer checkpoints gradients.
    """

    name: str
    width: int
    layers: int
    heads: int
    hidden: int
    rows: int
    length: int
    dtype: str = "float32"
    method: str = "lora"
    remat: bool = False

    @property
    def learners(self) -> tuple[str, ...]:
        """jaxlora first; the peer with one thread and with all, and, where the model is bfloat16,
        also with a bfloat16 adapter (PEFT's default is float32)."""
        peers = ("PEFT, 2 threads", "PEFT, 1 thread")
        if self.dtype == "bfloat16" and self.method == "lora":
            peers += tuple(f"{peer}, bfloat16 adapter" for peer in peers)
        return ("jaxlora", *peers)

    @property
    def matrix_parameters(self) -> int:
        per_layer = 4 * self.width**2 + 3 * self.width * self.hidden
        return self.layers * per_layer + VOCABULARY * self.width

    @property
    def adapter_parameters(self) -> int:
        per_layer = RANK * (8 * self.width + 3 * (self.width + self.hidden))
        return self.layers * per_layer if self.method == "lora" else 0

    def describe(self) -> dict[str, Any]:
        """Returns the sizes and the model's FLOPs per token (`performance` formula 4P or 6P)."""
        attention = 3 * 2 * self.layers * self.width * self.length
        factor = 4 if self.method == "lora" else 6
        flops = factor * self.matrix_parameters + attention + 6 * self.adapter_parameters
        return dataclasses.asdict(self) | {"flops_per_token": flops}

    def hf_config(self) -> dict[str, Any]:
        """Returns config.json of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.width // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": self.dtype,
        }

    def run_config(self, work: Path) -> dict[str, Any]:
        """Returns jaxlora's configuration of the run."""
        keys: dict[str, Any] = {
            "base_model": str(work / "model"),
            "datasets": [{"path": str(work / "rows.jsonl")}],
            "dataset_prepared_path": str(work / "prepared"),
            "output_dir": str(work / "out"),
            "sequence_len": self.length,
            "micro_batch_size": self.rows,
            "max_steps": 1000,
            "learning_rate": 1e-4,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "sample_packing": False,
            "bf16": self.dtype == "bfloat16",
            # Its best on a CPU: what is no product of matrices is sooner computed than saved.
            "remat": "full" if self.remat else "matmuls",
            "shuffle_merged_datasets": False,
        }
        if self.method == "lora":
            keys |= {"adapter": "lora", "lora_r": RANK, "lora_alpha": 2 * RANK}
            keys |= {"lora_target_linear": True, "lora_model_dir": str(work / "start")}
        return keys


def _cells() -> dict[str, Cell]:
    small, large = (288, 6, 6, 768), (768, 12, 12, 2048)
    cells = [
        Cell("110M LoRA fp32", *large, 4, 256),
        Cell("110M LoRA bf16", *large, 4, 256, dtype="bfloat16"),
        Cell("15M LoRA fp32", *small, 4, 256),
        Cell("110M full fp32", *large, 4, 256, method="full"),
        Cell("110M LoRA fp32, remat", *large, 4, 256, remat=True),
    ]
    for rows, length in ((16, 64), (2, 512), (1, 1024), (1, 4096)):
        cells.append(Cell(f"15M LoRA fp32, {rows} x {length}", *small, rows, length))
    for rows in (1, 2, 8):
        cells.append(Cell(f"15M LoRA fp32, batch {rows}", *small, rows, 256))
    for layers in (12, 24, 48):
        shape = (small[0], layers, *small[2:])
        cells.append(Cell(f"15M LoRA fp32, {layers} layers", *shape, 4, 256))
    return {cell.name: cell for cell in cells}


CELLS = _cells()


def write_inputs(cell: Cell, work: Path) -> None:
    """Writes the model, its tokenizer and the rows into `work`."""
    model = work / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(cell.hf_config()))
    tokenizer = Path(__file__).parents[1] / "jaxlora" / "assets" / "tiny-llama"
    for file in tokenizer.glob("token*"):
        shutil.copy(file, model)
    rng = np.random.default_rng(SEED)
    dtype = np.dtype(ml_dtypes.bfloat16 if cell.dtype == "bfloat16" else np.float32)
    tensors = {}
    for name, shape in _shapes(cell).items():
        scale = 1.0 if name.endswith("embed_tokens.weight") else 1 / math.sqrt(shape[-1])
        weight = rng.standard_normal(shape, np.float32) * scale if len(shape) == 2 else 1.0
        tensors[name] = np.broadcast_to(weight, shape).astype(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if cell.method == "lora":
        _write_adapter(cell, work / "start", rng)
    with (work / "rows.jsonl").open("w") as file:
        for _ in range(64):
            tokens = rng.integers(3, TOKENS, cell.length).tolist()
            file.write(json.dumps({"input_ids": tokens, "labels": tokens}) + "\n")


def _write_adapter(cell: Cell, folder: Path, rng: np.random.Generator) -> None:
    """Writes a fresh adapter on all linear layers, in PEFT's layout."""
    folder.mkdir()
    tensors = {}
    matrices = [name for name in _shapes(cell) if name.endswith("_proj.weight")]
    for name in matrices:
        rows, columns = _shapes(cell)[name]
        stem = "base_model.model." + name.removesuffix(".weight")
        a = rng.uniform(-1, 1, (RANK, columns)) / math.sqrt(columns)
        tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.zeros((rows, RANK), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name in matrices}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _shapes(cell: Cell) -> dict[str, tuple[int, ...]]:
    d, f = cell.width, cell.hidden
    matrices = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    matrices |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, d)}
    for layer in range(cell.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (d,)
        for name, shape in matrices.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (VOCABULARY, d)}
