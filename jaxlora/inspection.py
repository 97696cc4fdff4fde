"""`inspect`: what is in a model folder, an adapter, a run's output folder or a checkpoint."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jaxlora.checkpoints import hub
from jaxlora.checkpoints.adapter_files import open_adapter
from jaxlora.checkpoints.gguf_files import gguf_file, open_weights
from jaxlora.checkpoints.load import check_weights, read_model_config, storage_of
from jaxlora.checkpoints.peft_config import CONFIG_FILE
from jaxlora.checkpoints.store import CheckpointStore, locate
from jaxlora.checkpoints.tensor_view import Tensors
from jaxlora.checkpoints.whole import base_tables
from jaxlora.core.errors import UserError
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec, describe

Rows = list[tuple[str, str]]
_BITS = {"bfloat16": 16.0, "int8": 8.0, "int4": 4.25, "nf4": 4.127}  # int4, nf4: with block scales


def inspect(path: str | Path) -> Rows:
    """Returns ``(name, value)`` rows about a model, adapter, run or checkpoint.

    Args:
      path: a folder, or a hub id of a model or adapter.

    Raises:
      UserError: nothing known is there.
    """
    store, step = locate(path)
    if step is not None and CheckpointStore(store).steps():
        return _checkpoint(CheckpointStore(store), step)
    folder = hub.resolve(path)
    rows: Rows = []
    if (folder / CONFIG_FILE).is_file():
        rows += _adapter(folder)
    if (folder / "config.json").is_file() or gguf_file(folder) is not None:
        rows += _model(folder)
    for store_folder in (folder / "checkpoints", folder):
        checkpoints = CheckpointStore(store_folder)
        if checkpoints.steps():
            rows.append(("checkpoints", ", ".join(map(str, checkpoints.steps()))))
            rows += _checkpoint(checkpoints, max(checkpoints.steps()))
            break
    if not rows:
        raise UserError(
            f"{folder}: holds no config.json, {CONFIG_FILE} or checkpoint; nothing to inspect."
        )
    return rows


def _model(folder: Path) -> Rows:
    cfg, raw = read_model_config(folder)
    specs = describe(cfg)
    check_weights(folder, cfg)
    storage = storage_of(folder)
    files = open_weights(folder)
    total = sum(spec.size for spec in specs.values())
    linear = sum(spec.size for spec in specs.values() if spec.kind in ("linear", "experts"))
    names = sorted({name.rpartition(".")[2] for name in _linear_modules(specs)})
    sizes = ", ".join(
        f"{form} {_bytes((linear * bits + (total - linear) * 16) / 8)}"
        for form, bits in _BITS.items()
    )
    return [
        (
            "model",
            f"{folder} ({', '.join(raw.get('architectures') or [raw.get('model_type', '?')])})",
        ),
        ("shape", _shape(cfg)),
        ("parameters", f"{total:,} ({linear:,} in linear layers)"),
        ("weights", _tensors(files)),
        *([] if storage is None else [("quantized", storage.name)]),
        ("linear layers (LoRA targets)", ", ".join(names)),
        ("trained by LoRA r=16 on all", f"{_lora_size(specs, 16):,}"),
        ("base in memory, rest in bf16", sizes),
    ]


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _shape(cfg: ModelConfig) -> str:
    window = f", window {cfg.sliding_window}" if cfg.sliding_window else ""
    tied = ", tied embedding" if cfg.tie_embedding else ""
    return (
        f"{cfg.num_layers} layers x {cfg.embed_dim}, {cfg.num_heads} heads of {cfg.head_dim} on "
        f"{cfg.num_kv_heads} key-value heads, mlp {cfg.mlp_dim}, vocabulary {cfg.vocab_size:,}, "
        f"context {cfg.max_context:,}{window}{tied}"
    )


def _linear_modules(specs: dict[str, ParamSpec]) -> list[str]:
    return [name for spec in specs.values() if spec.kind == "linear" for name in spec.modules()]


def _lora_size(specs: dict[str, ParamSpec], rank: int) -> int:
    return sum(
        rank * sum(spec.shape) * len(spec.modules())
        for spec in specs.values()
        if spec.kind == "linear"
    )


def _tensors(files: Tensors) -> str:
    dtypes = Counter(info.dtype for info in files.info.values())
    counted = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    shards = {info.file for info in files.info.values()}
    size = sum(shard.stat().st_size for shard in shards)
    return f"{counted} in {len(shards)} file(s), {_bytes(size)}"


def _adapter(folder: Path) -> Rows:
    opened = open_adapter(folder)
    config, infos = opened.config, opened.tensors.info
    kind = "DoRA" if config.use_dora else "LoRA"
    targets, tables = config.target_modules, base_tables(opened.tensors, config)
    trained = sum(info.size for key, info in infos.items() if key not in tables)
    rows = max((info.shape[0] for info in tables.values()), default=0)
    return [
        (
            "adapter",
            f"{folder} ({opened.made_by}'s layout: {kind}, r {config.r}, alpha {config.alpha:g})",
        ),
        ("scale", "alpha / sqrt(r)" if config.use_rslora else "alpha / r"),
        ("base", str(opened.base_name)),
        ("targets", targets if isinstance(targets, str) else _names(targets)),
        ("trained parameters", f"{trained:,}"),
        *([("vocabulary", f"{rows:,} tokens; with {len(tables)} table(s)")] if tables else []),
        ("tensors", _tensors(opened.tensors)),
    ]


def _names(targets: Sequence[str]) -> str:
    """Module names; whole paths, of which there are many, by their last part."""
    return ", ".join(sorted({target.rpartition(".")[2] for target in targets}))


def _checkpoint(store: CheckpointStore, step: int) -> Rows:
    manifest = store.describe(step)
    parts = {"trainable": 0, "optimizer": 0}
    for path, (shape, _) in manifest.leaves.items():  # paths such as ['trainable']['adapter']...
        for part in parts:
            if path.startswith(f"['{part}']"):
                parts[part] += math.prod(shape)
    return [
        ("checkpoint", f"{store.path(step)} (step {step})"),
        ("trained in it", f"{parts['trainable']:,} parameters"),
        ("optimizer state", f"{parts['optimizer']:,} numbers"),
    ]
