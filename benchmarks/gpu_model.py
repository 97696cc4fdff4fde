"""Models of published shapes with random weights, made on the device leaf by leaf."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlora import lora
from jaxlora.core.tree import Tree
from jaxlora.lora import LoraConfig, Target
from jaxlora.models.attention_backend import choose_backend
from jaxlora.models.config import ModelConfig
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import ParamSpec, describe
from jaxlora.models.targets import targets_of_specs
from jaxlora.models.transformer import Transformer
from jaxlora.ops import integer, nf4
from jaxlora.ops.arrays import DoubleQuantized, QuantizedArray
from jaxlora.optim.optimizers import make_optimizer
from jaxlora.training.step import make_train_step

RANK = 16
_MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        **_MISTRAL,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        **_MISTRAL,
        "vocab_size": 32768,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    # For the script's own test.
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    },
}


@dataclasses.dataclass
class Subject:
    """A model that trains: its arrays and what its step needs.

    Attributes:
      storage: of the frozen linear layers: bf16, or a format of `jaxlora.ops.quantize`.
    """

    cfg: ModelConfig
    storage: str
    dtype: str
    targets: dict[str, Target]
    frozen: Tree
    trainable: Tree
    optimizer: optax.GradientTransformation
    opt_state: Any

    @property
    def adapter_size(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.trainable))

    def step(self, remat: str, attention: str = "auto", most_segments: int | None = 1) -> Any:
        """Returns jaxlora's train step and the name of the attention that it uses."""
        platform = jax.default_backend()
        backend = choose_backend(
            self.cfg, platform, self.dtype, asked=attention, most_segments=most_segments
        )
        transformer = Transformer(self.cfg, dtype=self.dtype, remat=remat, attend=backend.attend)
        like = (self.trainable, self.opt_state)
        step = make_train_step(transformer, self.targets, self.optimizer, jax.random.key(5), like)
        return step, backend.name


def make_subject(name: str, storage: str, dtype: str = "bfloat16") -> Subject:
    """Returns a model with random weights and a fresh LoRA adapter on all its linear layers."""
    cfg = read_config(MODELS[name])
    specs = describe(cfg)
    targets = targets_of_specs(specs, LoraConfig(r=RANK, alpha=RANK))
    frozen = {}
    for number, (path, spec) in enumerate(sorted(specs.items())):
        key = jax.random.fold_in(jax.random.key(0), number)
        frozen[path] = jax.block_until_ready(_leaf(spec, storage, dtype, key))
    adapter = lora.init(frozen, targets, jax.random.key(1))
    # B is not zero, or half of the gradients would be.
    adapter = jax.tree.map(lambda x: x + 1e-3 * jnp.ones_like(x), adapter)
    trainable = {"params": {}, "adapter": adapter}
    every = jax.tree.map(lambda leaf: True, trainable)
    optimizer = make_optimizer("adamw", lambda step: 1e-4, decayed=every, matrices=every)
    opt_state = jax.jit(optimizer.init)(trainable)
    return Subject(cfg, storage, dtype, targets, frozen, trainable, optimizer, opt_state)


def _leaf(spec: ParamSpec, storage: str, dtype: str, key: jax.Array) -> Any:
    if spec.kind != "linear" or storage == "bf16":
        return _plain(spec.full_shape, spec.init, jnp.dtype(dtype), key)
    assert spec.layers is not None
    into, out = spec.shape
    values, scales = _MADE[storage](len(spec.layers), into, out, key)
    return QuantizedArray(values, scales, storage, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _plain(shape, init, dtype, key):
    if isinstance(init, str):
        return jnp.full(shape, init == "ones", dtype)
    # One layer at a time: the float32 numbers before rounding take twice the place.
    lead = shape[0] if len(shape) == 3 else 1
    each = (shape[1:],) if len(shape) == 3 else (shape,)
    keys = jax.random.split(key, lead)
    rows = jax.lax.map(lambda k: (init * jax.random.normal(k, each[0])).astype(dtype), keys)
    return rows.reshape(shape)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nf4(layers, into, out, key):
    """Codes and nested scales that stand for weights with a deviation of about 0.02."""
    keys = jax.random.split(key, 2)
    values = jax.random.bits(keys[0], (layers, out, into // 2), jnp.uint8)
    codes = jax.random.bits(keys[1], (layers, out, into // nf4.BLOCK), jnp.uint8)
    nested = math.ceil(out * into / nf4.BLOCK / nf4.NESTED_BLOCK)
    absmax = jnp.full((layers, nested), 0.005, jnp.float32)
    return values, DoubleQuantized(codes, absmax, jnp.full((layers,), 0.035, jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _int4(layers, into, out, key):
    packed = jax.random.bits(key, (layers, into // 2, out), jnp.uint8)
    groups = into // integer.group_length(into, 64)
    return integer.unpack(packed), jnp.full((layers, groups, out), 0.0045, jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _int8(layers, into, out, key):
    values = jax.lax.bitcast_convert_type(
        jax.random.bits(key, (layers, into, out), jnp.uint8), jnp.int8
    )
    return values, jnp.full((layers, 1, out), 0.0003, jnp.float32)


_MADE = {"nf4": _nf4, "int4": _int4, "int8": _int8}
