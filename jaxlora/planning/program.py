"""The train step of a run, with shapes for arrays: ready to be lowered for any device."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import lora
from jaxlora.checkpoints import hub
from jaxlora.checkpoints.adapter import read_adapter
from jaxlora.checkpoints.fitted import fit
from jaxlora.checkpoints.label_head import optional_leaves
from jaxlora.checkpoints.load import QuantSpec, read_model_config, storage_of
from jaxlora.checkpoints.storage import Storage
from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.core.tree import unflatten
from jaxlora.lora import changes_base
from jaxlora.models.config import ModelConfig
from jaxlora.ops.arrays import PatchedArray
from jaxlora.parallel.mesh import batch_shards
from jaxlora.parallel.rules import Placement
from jaxlora.planning.leaves import frozen_leaves, note, trained_leaves
from jaxlora.training.labels import wanted_labels
from jaxlora.training.setup import Plan
from jaxlora.training.shape import Shape, adapter_options, shape_of_run
from jaxlora.training.state import make_tx, optimizer_shapes, quant_spec
from jaxlora.training.step import make_train_step

# The schedule is compiled into the step, whatever its length.
_ANY_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step and the shapes, dtypes and shardings of its arguments.

    Attributes:
      step: jitted, from `make_train_step`.
      trainable, opt_state, frozen, batch: its arguments, as `jax.ShapeDtypeStruct`.
      shape: of the run.
      quantization: how the frozen base is stored, None for plain.
      initial: what a run keeps of an adapter that it splits off its base, `TrainState.initial`.
    """

    step: Any
    trainable: Any
    opt_state: Any
    frozen: Any
    batch: dict[str, Any]
    shape: Shape
    quantization: QuantSpec | None
    initial: Any

    def lower(self) -> Any:
        """Returns the lowered step."""
        number = note(jnp.int32(0), self.shape.placement.sharding((), ()))
        arguments = (self.trainable, self.opt_state, self.frozen, self.batch, number)
        return self.step.lower(*arguments)


def make_program(config: Config, devices: Sequence[Any], platform: str | None = None) -> Program:
    """Returns the program of a run on `devices`, which need not be of this machine.

    Reads config.json of the base, and the adapter of `lora_model_dir` if there is one.

    Args:
      config: the run.
      devices: where it runs.
      platform: JAX's word for what they are, if they only stand for others.

    Raises:
      UserError: a model or a rule that `train` would refuse, a mesh that does not fit the devices.
    """
    folder = model_folder(config)
    stored, raw = read_model_config(folder)
    num_labels = wanted_labels(config, stored, raw)
    wanted = fit(stored, None, num_labels=num_labels)
    fresh = optional_leaves(stored, wanted)
    options, start = adapter_options(config, wanted, fresh), None
    if options is not None and config.lora_model_dir:
        start = read_adapter(hub.resolve(config.lora_model_dir), stored)
        options = start.config
    rows = stored.vocab_size if start is None else start.cfg.vocab_size
    cfg = fit(stored, options, rows, num_labels)
    shape = shape_of_run(config, cfg, options, start, fresh, devices=devices, platform=platform)
    replicas = batch_shards(shape.placement.mesh)
    rows = config.micro_batch_size * replicas
    batch = (derived.accumulation_steps(config, replicas), rows, config.sequence_len)
    quantization = _stored_as(config, storage_of(folder), raw)
    return _program(config, shape, quantization, options, batch, _ANY_STEPS)


def program_of(plan: Plan) -> Program:
    """Returns the program that a run will compile, to the letter, before it has its arrays.

    Of a base that somebody else has quantized, zero points and groups are only about right.

    Args:
      plan: the checked run.
    """
    config, model, batches = plan.config, plan.model, plan.batches
    described = hub.resolve(config.base_model_config) if config.base_model_config else model.folder
    quantization = _stored_as(config, storage_of(model.folder), read_model_config(described)[1])
    shape = Shape(
        model.cfg, model.specs, model.targets, model.parts, model.transformer, model.placement
    )
    batch = (batches.accumulation, batches.rows, batches.length)
    return _program(config, shape, quantization, model.lora, batch, plan.total_steps)


def _program(
    config: Config,
    shape: Shape,
    quantization: QuantSpec | None,
    options: lora.LoraConfig | None,
    batch_shape: tuple[int, int, int],
    steps: int,
) -> Program:
    shape = dataclasses.replace(shape, placement=Placement(shape.placement.mesh, note))
    frozen = frozen_leaves(shape, quantization)
    trainable = trained_leaves(shape, _pairs(shape, frozen, options))
    optimizer, _ = make_tx(config, trainable, shape.specs, steps)
    opt_state = optimizer_shapes(optimizer, trainable, shape.placement)
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    like = (trainable, opt_state)
    step = make_train_step(shape.transformer, shape.targets, optimizer, key, like)
    batch = _batch(shape, batch_shape)
    splits = options is not None and changes_base(options.init)
    initial = {p: [x["a"], x["b"]] for p, x in trainable["adapter"].items()} if splits else {}
    return Program(step, trainable, opt_state, frozen, batch, shape, quantization, initial)


def model_folder(config: Config) -> Path:
    """Returns a folder with config.json of the base; nothing else is downloaded."""
    if config.base_model_config:
        return hub.resolve_config(config.base_model_config)
    return hub.resolve_config(config.base_model, config.revision_of_model)


def _stored_as(config: Config, storage: Storage | None, raw: dict[str, Any]) -> QuantSpec | None:
    if storage is None:
        return quant_spec(config)
    given = raw.get("quantization_config") or raw.get("compression_config") or {}
    size = given.get("group_size") or given.get("q_group_size") or 128
    double = bool(given.get("bnb_4bit_use_double_quant", False))
    group = size if isinstance(size, int) and size > 0 else 128
    return QuantSpec(
        storage.format,
        group_size=group,
        double_quant=double,
        embeddings=config.quantize_embeddings,
    )


def _pairs(shape: Shape, frozen: dict[str, Any], options: Any) -> dict[str, Any]:
    """Shapes of a fresh adapter: those of a loaded one, or one split off the base, are alike."""
    if options is None or not shape.targets:
        return {}
    base = {p: x.base if isinstance(x, PatchedArray) else x for p, x in frozen.items()}
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda leaves: lora.init(unflatten(leaves), shape.targets, key, True), base
    )


def _batch(shape: Shape, full: tuple[int, int, int]) -> dict[str, Any]:
    """Shapes of a batch of full rows; what the data decide is their content only."""
    cfg: ModelConfig = shape.cfg

    def noted(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(full, dtype, sharding=shape.placement.batch_sharding(full))

    names = ("tokens", "positions", "segment_ids", "targets")
    batch = {name: noted(jnp.int32) for name in names} | {"weights": noted(jnp.float32)}
    pairs_of_texts = cfg.num_labels and cfg.token_types > 1
    return batch | ({"token_types": noted(jnp.int32)} if pairs_of_texts else {})
