"""Trained weights out: a PEFT adapter, or the whole model of a full fine-tune."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import lora
from jaxlora.checkpoints import hub, run_folder
from jaxlora.checkpoints.adapter import read_adapter, tensors_beside
from jaxlora.checkpoints.adapter_files import open_adapter
from jaxlora.checkpoints.fitted import load_base, resized_tables, written_config
from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.checkpoints.label_head import label_config
from jaxlora.checkpoints.load import read_model_config
from jaxlora.checkpoints.peft import save_adapter
from jaxlora.checkpoints.peft_config import CONFIG_FILE
from jaxlora.checkpoints.save import GENERATION_FILE, save_model
from jaxlora.checkpoints.store import CheckpointStore, locate
from jaxlora.config.load import load_config
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.data.tokenizer import pad_id, template_text
from jaxlora.lora.parts import fill
from jaxlora.models.parameters import describe
from jaxlora.models.task import NEXT_TOKEN, task_of
from jaxlora.training.resume import CHECKPOINTS
from jaxlora.training.setup import Model, open_model
from jaxlora.training.state import TrainState, make_tx, quant_spec, saved, split_pairs

_GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_weights(
    config: Config,
    model: Model,
    state: Tree,
    folder: Path,
    labels: Sequence[str] | None = None,
) -> None:
    """Writes the PEFT adapter, or the whole model of a full fine-tune, with its tokenizer.

    An adapter that started as a part of the base is written as its difference to that part, of
    twice the rank: it fits the base as it was.

    Args:
      config: of the run.
      model: its base.
      state: from `jaxlora.training.state.saved`, or as restored from a checkpoint.
      folder: where to.
      labels: what a classifier's labels are called; None or nothing: by number.

    Raises:
      UserError: weights that are not finite, or a folder that cannot be written.
    """
    trainable = state["trainable"]
    if model.lora is None:
        _save_whole(config, model, trainable["params"], folder, labels or ())
        return
    adapter, targets, options = trainable["adapter"], model.targets, model.lora
    storage, split = quant_spec(config), None
    if "initial" in state:
        # What was quantized was the rest of the base, which nobody else has.
        storage, split = None, None if storage is None else str(options.init)
        adapter, targets, options = lora.as_difference(adapter, state["initial"], targets, options)
    save_adapter(
        folder,
        adapter,
        targets,
        options,
        base_name=config.base_model,
        revision=config.revision_of_model,
        fingerprint=model.fingerprint or None,
        storage=storage,
        split=split,
        specs=model.specs,
        beside=tensors_beside(
            model.cfg,
            model.stored,
            targets,
            model.parts,
            trainable["params"],
            _tables(config, model),
        ),
        labels=labels or (),
    )
    _save_tokenizer(config, model, folder)


def _save_tokenizer(config: Config, model: Model, folder: Path) -> None:
    choice = config.chat_template_jinja or config.chat_template
    if choice is not None:  # who loads the result should ask as it was taught
        model.tokenizer.chat_template = template_text(model.tokenizer, choice)
    if model.cfg.num_labels and model.tokenizer.pad_token is None:
        # transformers finds the last token of a text by the padding after it.
        padding = model.tokenizer.convert_ids_to_tokens(pad_id(model.tokenizer))
        model.tokenizer.pad_token = padding
    model.tokenizer.save_pretrained(str(folder))
    special = config.special_tokens.model_dump(exclude_none=True)
    named = [name for name in _GENERATION_IDS if name.removesuffix("_id") in special]
    ids = {name: int(getattr(model.tokenizer, name)) for name in named}
    if ids and task_of(model.cfg) == NEXT_TOKEN:
        content = json.dumps(_generation(model.folder, ids), indent=2) + "\n"
        (folder / GENERATION_FILE).write_text(content, encoding="utf-8")


def _generation(base: Path, ids: Mapping[str, int]) -> dict[str, Any]:
    """generation_config.json of a base with other special tokens; what ended a text still does."""
    _, raw = read_model_config(base)
    content = {name: raw[name] for name in _GENERATION_IDS if raw.get(name) is not None}
    if (base / GENERATION_FILE).is_file():
        content = read_json_object(base / GENERATION_FILE, "")
    before = content.get("eos_token_id", [])
    content |= ids
    if "eos_token_id" in ids:
        others = before if isinstance(before, list) else [before]
        ends = [ids["eos_token_id"], *(end for end in others if end != ids["eos_token_id"])]
        content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return content


def _tables(config: Config, model: Model) -> dict[str, np.ndarray]:
    """The tables that new tokens have made grow, read once more from the base."""
    if model.cfg.vocab_size == model.stored.vocab_size:
        return {}
    if model.start is not None:
        return model.start.tables
    return resized_tables(
        model.folder, model.stored, model.cfg, mean_resizing=config.mean_resizing_embeddings
    )


def _save_whole(
    config: Config, model: Model, trained: Tree, folder: Path, labels: Sequence[str]
) -> None:
    _, raw = read_model_config(model.folder)
    content = written_config(raw, model.stored, model.cfg)
    if model.cfg.num_labels:
        content = label_config(content, model.cfg, labels, pad_id(model.tokenizer))
    with tempfile.TemporaryDirectory() as temporary:
        _save_tokenizer(config, model, Path(temporary))
        save_model(
            _whole_model(config, model, trained),
            model.cfg,
            folder,
            source_folder=model.folder,
            tokenizer_folder=Path(temporary),
            config=content,
            dtype=model.transformer.dtype,
            overwrite=True,
        )


def _whole_model(config: Config, model: Model, trained: Tree) -> Tree:
    """What was trained and, read once more, what was frozen (`unfrozen_parameters`)."""
    if model.specs.keys() == {path for path, part in model.parts.items() if part.whole}:
        return unflatten(trained)
    base = load_base(
        model.folder,
        model.stored,
        model.cfg,
        dtype=model.transformer.dtype,
        mean_resizing=config.mean_resizing_embeddings,
        trained=[path for path, part in model.parts.items() if part.whole],
    )
    leaves = flatten(base)
    for path, part in model.parts.items():
        hole = None if part.whole else part.hole(leaves[path])
        leaves[path] = fill(hole, jnp.asarray(trained[path]))
    return unflatten(leaves)


def export(source: str | Path, output: str | Path, *, base: str | Path | None = None) -> int | None:
    """Writes a PEFT adapter (or model) folder; returns the step of the checkpoint it came from.

    Args:
      source: a run's output folder (newest good checkpoint), one of its checkpoints, or an adapter
        made elsewhere (PEFT, mlx-lm, torchtune), which has no step.
      output: folder to write.
      base: folder or hub id of such an adapter's base model; default: the one it names.

    Raises:
      UserError: nothing of the kind there, damaged files, an output folder that holds something.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is not an empty folder; choose a new one for the export.")
    folder = Path(source)
    if _is_made_elsewhere(folder) or not folder.exists():
        _export_adapter(hub.resolve(source), output, base)
        return None
    return _export_checkpoint(source, output)


def _is_made_elsewhere(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and not run_folder.holds_run(folder)


def _export_adapter(folder: Path, output: Path, base: str | Path | None) -> None:
    opened = open_adapter(folder)
    name = base or opened.base_name
    if not name:
        raise UserError(f"{folder}: its {CONFIG_FILE} names no base model; give it with --base.")
    # Its config.json says what the adapter must fit; its weights are not needed.
    stored, _ = read_model_config(hub.resolve(name))
    adapter = read_adapter(folder, stored)
    specs = describe(adapter.cfg)
    save_adapter(
        output,
        adapter.pairs,
        adapter.targets,
        adapter.config,
        base_name=str(name),
        specs=specs,
        beside=tensors_beside(
            adapter.cfg, stored, adapter.targets, adapter.parts, adapter.params, adapter.tables
        ),
        labels=adapter.labels,
    )


def _export_checkpoint(source: str | Path, output: Path) -> int:
    store_folder, step = locate(source)
    if step is None and (store_folder / CHECKPOINTS).is_dir():
        store_folder = store_folder / CHECKPOINTS
    written = store_folder.parent / "config.yml"
    if not written.is_file():
        raise UserError(f"{source}: is not a run's output folder or a checkpoint inside one.")
    config = load_config(written)
    model = open_model(config)
    restored, meta = CheckpointStore(store_folder).restore(step, abstract_state(config, model))
    export_weights(config, model, restored, output, meta.get("labels"))
    return meta["step"]


def abstract_state(config: Config, model: Model) -> Tree:
    """Returns shapes and dtypes of what a checkpoint of this run holds; reads no weights."""
    shapes = {
        path: jax.ShapeDtypeStruct(spec.full_shape, jnp.float32)
        for path, spec in model.specs.items()
    }
    trained = {
        path: jax.ShapeDtypeStruct(part.shape(shapes[path].shape), jnp.float32)
        for path, part in model.parts.items()
    }
    trainable: Tree = {"params": trained, "adapter": {}}
    if model.lora is not None:
        trainable["adapter"] = jax.eval_shape(
            lambda params, key: lora.init(params, model.targets, key),
            unflatten(shapes),
            jax.random.key(0),
        )
    optimizer, _ = make_tx(config, trainable, model.specs, total_steps=1)
    state = TrainState(
        trainable,
        jax.eval_shape(optimizer.init, trainable),
        {},
        initial=jax.eval_shape(lambda adapter: split_pairs(model, adapter), trainable["adapter"]),
    )
    return saved(state)
