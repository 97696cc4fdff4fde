"""The arrays of a run: what is trained, what is frozen, the optimizer's state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from jaxlora import lora
from jaxlora.checkpoints.fitted import load_base
from jaxlora.checkpoints.load import QuantSpec
from jaxlora.checkpoints.manifest import leaf_paths
from jaxlora.checkpoints.space import checkpoint_bytes
from jaxlora.config import derived
from jaxlora.config.schema import Config
from jaxlora.core.tree import Tree, flatten, unflatten
from jaxlora.models.parameters import ParamSpec, init_params
from jaxlora.ops.arrays import PatchedArray, QuantizedArray
from jaxlora.optim.optimizers import make_optimizer
from jaxlora.optim.schedules import make_schedule
from jaxlora.parallel.rules import Placement
from jaxlora.training.leaves import needed_part
from jaxlora.training.nonfinite import Skipped
from jaxlora.training.setup import Model

Progress = Callable[[int, int], None]


@dataclasses.dataclass
class TrainState:
    """The arrays of a run.

    Attributes:
      trainable: ``{"params": {path: array}, "adapter": {...}}``, float32; see `training.step`.
      opt_state: the optimizer's.
      frozen: leaves that do not train.
      step: steps taken.
      skipped: how many of them were left out.
      initial: pairs that were split off the base, `frozen` being the rest; empty otherwise.
    """

    trainable: Tree
    opt_state: Any
    frozen: Tree
    step: int = 0
    skipped: Skipped = dataclasses.field(default_factory=Skipped)
    initial: Tree = dataclasses.field(default_factory=dict)


def load_weights(
    config: Config, model: Model, progress: Progress | None = None
) -> tuple[Tree, Tree]:
    """Returns ``(trainable, frozen)`` on the devices: base weights, adapter loaded or fresh.

    Raises:
      UserError: missing, leftover, misshapen or damaged tensors.
    """
    key = jax.random.key(config.seed)
    placed = _Placed(model)
    splitter = None
    if model.start is None and model.lora is not None and model.splits_base:
        splitter = lora.Splitter(model.targets, model.lora, _adapter_key(key))
    if config.reinit_weights:
        leaves = {
            path: placed(path, leaf)
            for path, leaf in flatten(init_params(model.cfg, key, jnp.float32)).items()
        }
    else:
        params = load_base(
            model.folder,
            model.stored,
            model.cfg,
            dtype=model.transformer.dtype,
            quantization=quant_spec(config),
            place=placed,
            split=splitter,
            progress=progress,
            trained=model.parts,
            needed=lambda path: needed_part(model.placement, path, model.specs[path], model.parts),
            mean_resizing=config.mean_resizing_embeddings,
            seed=config.seed,
        )
        leaves = flatten(params)
    frozen = {path: leaf for path, leaf in leaves.items() if leaf is not None}
    return {"params": placed.trained, "adapter": _pairs(model, frozen, key, splitter)}, frozen


class _Placed:
    """Puts leaves on the devices as they are read, what trains of them apart.

    Attributes:
      trained: ``{path: array}`` so far, float32: bfloat16 cannot hold a small update of a large
        weight.
    """

    def __init__(self, model: Model):
        self.model = model
        self.trained: Tree = {}

    def __call__(self, path: str, leaf: Any) -> Any:
        """Returns what is frozen of a leaf, None if nothing is."""
        model, spec, part = self.model, self.model.specs[path], self.model.parts.get(path)
        put = model.placement.weight
        start = model.start
        if start is not None:
            leaf = start.tables.get(path, leaf)
        if part is None or not part.whole:
            kept = isinstance(leaf, QuantizedArray) or spec.kind == "buffer"
            rest = leaf if kept else _as(leaf, model.transformer.dtype)
            frozen = put(rest, spec.axes, stacked=spec.layers is not None)
            if part is None:
                return frozen
        values = part.take(leaf) if start is None else start.params[path]
        self.trained[path] = put(
            _as(values, jnp.float32), part.axes(spec.axes), stacked=part.stacked
        )
        jax.block_until_ready(self.trained[path])  # or the host's copy would stay
        if part.whole:
            return None
        hole = part.hole(frozen)
        return dataclasses.replace(hole, index=put(hole.index, (None,), stacked=False))


def _as(leaf: Any, dtype: DTypeLike) -> Any:
    return leaf if leaf.dtype == jnp.dtype(dtype) else leaf.astype(jnp.dtype(dtype))


def _adapter_key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, 1)


def _pairs(model: Model, leaves: Tree, key: jax.Array, splitter: lora.Splitter | None) -> Tree:
    """Returns the low-rank pairs on the devices: loaded, split off the base, or fresh."""
    if model.lora is None:
        return {}
    base = {p: x.base if isinstance(x, PatchedArray) else x for p, x in leaves.items()}
    if model.start is not None:
        pairs = model.start.pairs
    elif splitter is not None:
        pairs = lora.with_magnitudes(unflatten(base), splitter.adapter(), model.targets)
    else:
        pairs = lora.init(unflatten(base), model.targets, _adapter_key(key), model.lora.init)
    return {
        path: model.placement.adapter(
            pair, model.specs[path].axes, stacked=model.targets[path].stacked
        )
        for path, pair in pairs.items()
    }


def quant_spec(config: Config) -> QuantSpec | None:
    """Returns how the frozen base is stored, None for plain arrays."""
    chosen = derived.quantization(config)
    return chosen and QuantSpec(
        chosen.format, double_quant=chosen.double_quant, embeddings=config.quantize_embeddings
    )


def make_tx(
    config: Config, trainable: Tree, specs: Mapping[str, ParamSpec], total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of a run and its learning-rate schedule."""
    schedule = make_schedule(
        config.lr_scheduler,
        config.learning_rate,
        total_steps=total_steps,
        warmup_steps=derived.warmup_steps(config, total_steps),
        min_ratio=config.cosine_min_lr_ratio or 0.0,
        decay_steps=derived.decay_steps(config, total_steps),
        quadratic_warmup=config.lr_quadratic_warmup,
    )
    pairs = {
        path: {part: part in ("a", "b") for part in pair}
        for path, pair in trainable["adapter"].items()
    }
    kinds = {path: specs[path].kind for path in trainable["params"]}
    optimizer = make_optimizer(
        derived.optimizer(config),
        schedule,
        # As in transformers: norms and biases do not decay.
        decayed={
            "params": {p: kind not in ("norm", "bias", "buffer") for p, kind in kinds.items()},
            "adapter": pairs,
        },
        matrices={
            "params": {path: kind == "linear" for path, kind in kinds.items()},
            "adapter": pairs,
        },
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        rates=_loraplus_rates(config, trainable, specs),
        mu_dtype=config.mu_dtype,
    )
    return optimizer, schedule


def _loraplus_rates(config: Config, trainable: Tree, specs: Mapping[str, ParamSpec]) -> Tree | None:
    """Multiples of the learning rate (LoRA+, Hayou et al. 2024), grouped as PEFT does.

    B and every vector learn faster; an adapter of an embedding has a rate of its own.
    """
    if config.loraplus_lr_ratio is None:
        return None
    ratio = config.loraplus_lr_ratio

    def of_pair(path: str, pair: Tree) -> dict[str, float]:
        if specs[path].kind == "embedding":
            return dict.fromkeys(pair, config.loraplus_lr_embedding / config.learning_rate)
        return {part: 1.0 if part == "a" else ratio for part in pair}

    return {
        "params": {
            path: ratio if len(specs[path].shape) == 1 else 1.0 for path in trainable["params"]
        },
        "adapter": {path: of_pair(path, pair) for path, pair in trainable["adapter"].items()},
    }


def init_optimizer(
    optimizer: optax.GradientTransformation, trainable: Tree, placement: Placement
) -> Any:
    """Returns a fresh optimizer state; moments live where their parameters live."""
    shapes = optimizer_shapes(optimizer, trainable, placement)
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    return jax.jit(optimizer.init, out_shardings=shardings)(trainable)


def optimizer_shapes(
    optimizer: optax.GradientTransformation, trainable: Tree, placement: Placement
) -> Any:
    """Returns shape, dtype and sharding of every array of the optimizer's state.

    Args:
      optimizer: from `make_tx`.
      trainable: arrays, or their shapes, dtypes and shardings.
      placement: of what belongs to no parameter.
    """
    leaves = dict(jax.tree_util.tree_leaves_with_path(trainable))
    whole = placement.sharding((), ())

    # By path and shape: a factored moment has its parameter's path and another shape, and
    # optimizers that mask leaves (Muon) leave holes in the tree. The codes of an 8-bit moment are
    # one key deeper and have their parameter's shape.
    def sharding(path, moment):
        for start in range(len(path)):
            # Not `or`: an array has no truth value.
            leaf = leaves.get(path[start:], leaves.get(path[start:-1]))
            if leaf is not None and leaf.shape == moment.shape:
                return leaf.sharding
        return whole

    shapes = jax.eval_shape(optimizer.init, trainable)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(path, x)), shapes
    )


def saved(state: TrainState) -> Tree:
    """Returns the part of the state that a checkpoint holds."""
    kept = {"trainable": state.trainable, "optimizer": state.opt_state}
    return kept | ({"initial": state.initial} if state.initial else {})


def needed_bytes(
    config: Config, state: TrainState, total_steps: int, save_every: int | None
) -> dict[str, int]:
    """Returns the bytes that a run will write, by what they are."""
    one = checkpoint_bytes(leaf_paths(saved(state)))
    saves = 1 + (total_steps // save_every if save_every else 0)
    # One more is written before the oldest goes.
    count = min(saves, config.save_total_limit + 1)
    weights = state.trainable if config.adapter else (state.trainable, state.frozen)
    return {f"{count} checkpoints": count * one, "the result": bytes_on_devices(weights)}


def split_pairs(model: Model, adapter: Tree) -> Tree:
    """Returns a copy of the pairs of a fresh adapter if they were split off the base, else {}.

    The export subtracts them: what is trained is then an adapter for the base as it was.
    """
    if not model.splits_base:
        return {}
    return {
        path: {part: jnp.copy(pair[part]) for part in ("a", "b")} for path, pair in adapter.items()
    }


def bytes_on_devices(tree: Any) -> int:
    """Returns the bytes the arrays of a tree take, 4-bit values counted as half a byte."""
    return sum(
        int(np.ceil(leaf.size * (0.5 if "int4" in str(leaf.dtype) else leaf.dtype.itemsize)))
        for leaf in jax.tree.leaves(tree)
    )
