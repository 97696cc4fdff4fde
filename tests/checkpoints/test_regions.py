"""A process that needs a part of a model reads that part, and finds in it the bits of the whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.checkpoints.load import load_params
from jaxlora.checkpoints.matrices import QuantSpec
from jaxlora.checkpoints.regions import Region
from jaxlora.checkpoints.save import save_model
from jaxlora.checkpoints.tensors import TensorFiles
from jaxlora.core.tree import flatten
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import describe, init_params
from jaxlora.ops.arrays import QuantizedArray

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
STORAGES = {
    "plain": None,
    "int4": QuantSpec("int4"),
    "int8": QuantSpec("int8"),
    "nf4": QuantSpec("nf4", double_quant=False),
    "double": QuantSpec("nf4"),
    "tables": QuantSpec("int8", embeddings="int8"),
}


@pytest.fixture(scope="module")
def base(write_tiny_llama, tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("wide"), **SIZES)


def half(shape, which):
    """The second or first half of the dimension `which` from the end, of two."""
    box = [(0, size) for size in shape]
    ways = [1] * len(shape)
    if len(shape) > 1 and shape[-which] % 2 == 0:
        box[-which], ways[-which] = (shape[-which] // 2, shape[-which]), 2
    return Region(tuple(shape), tuple(box), tuple(ways))


def halves(whole, part, which):
    """Pairs of the arrays of two leaves, cut to that half as they are split over two devices."""
    coded = isinstance(whole, QuantizedArray) and whole.format == "nf4"
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        axis = {1: -1, 2: -2}[3 - which if coded else which]
        size = x.shape[axis] if x.ndim > 1 else 1
        keep = slice(size // 2, None) if x.ndim > 1 and size % 2 == 0 else slice(None)
        index = (..., keep) if axis == -1 else (..., keep, slice(None))
        yield (x[index], y[index]) if x.ndim > 1 else (x, y)


@pytest.mark.parametrize("which", [1, 2], ids=["outputs", "inputs"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_part_has_the_bits_of_the_whole(base, storage, which):
    cfg = read_config(json.loads((base / "config.json").read_text()))
    specs = describe(cfg)
    options = {"dtype": jnp.float32, "quantization": STORAGES[storage]}
    keep = {"place": lambda path, leaf: leaf}
    whole = flatten(load_params(base, cfg, **options, **keep))
    needed = lambda path: half(specs[path].shape, which)  # noqa: E731
    part = flatten(load_params(base, cfg, **options, **keep, needed=needed))
    for path, leaf in whole.items():
        for x, y in halves(leaf, part[path], which):
            assert x.tobytes() == y.tobytes(), path


@pytest.mark.parametrize("which", range(4))
def test_progress_counts_the_experts_that_another_process_reads(tmp_path, which):
    cfg = dataclasses.replace(read_config(MIXTRAL), init_std=0.1)
    save_model(init_params(cfg, jax.random.key(0), "float32"), cfg, tmp_path, config=MIXTRAL)
    specs, steps = describe(cfg), []

    def needed(path):
        shape = specs[path].shape
        ways = (4, *[1] * (len(shape) - 1)) if specs[path].parts else (1,) * len(shape)
        box = [(0, size) for size in shape]
        box[0] = (which, which + 1) if specs[path].parts else box[0]
        return Region(tuple(shape), tuple(box), ways)

    load_params(
        tmp_path, cfg, dtype=jnp.float32, needed=needed, progress=lambda *a: steps.append(a)
    )
    total = sum(spec.size for spec in specs.values())
    assert steps[-1] == (total, total)
    assert steps == sorted(set(steps))


def test_what_is_not_needed_is_not_read(base, monkeypatch):
    """The pages of a mapped file are touched by nobody: the part is asked for before any copy."""
    cfg = read_config(json.loads((base / "config.json").read_text()))
    specs, taken = describe(cfg), []
    of = Region.of
    monkeypatch.setattr(Region, "of", lambda self, x: taken.append(of(self, x)) or taken[-1])
    load_params(
        base,
        cfg,
        dtype=jnp.float32,
        place=lambda path, leaf: None,
        needed=lambda path: half(specs[path].shape, 1),
    )
    total = sum(info.size for info in TensorFiles(base).info.values())
    assert sum(each.size for each in taken) <= 0.51 * total
    assert all(not each.flags.owndata for each in taken), "a view of the file"


@pytest.mark.parametrize(
    ("shape", "format", "wanted"),
    [
        ((256, 64), "int4", ((128, 256), (0, 64))),
        ((192, 64), "int4", ((0, 192), (0, 64))),  # three groups do not divide by two devices
        ((97, 64), "int4", ((0, 97), (0, 64))),
        ((256, 64), "int8", ((0, 256), (0, 64))),
        ((256, 64), "nf4", ((128, 256), (0, 64))),
        ((96, 64), "nf4", ((0, 96), (0, 64))),
    ],
)
def test_a_region_grows_to_what_can_be_quantized_alone(shape, format, wanted):
    start = shape[0] // 2 if shape[0] % 2 == 0 else 0
    region = Region(shape, ((start, shape[0]), (0, shape[1])), (2, 1))
    assert region.quantized(format, 64, double_quant=False).box == wanted


def test_experts_of_others_are_not_read():
    region = Region((8, 4, 4), ((2, 4), (0, 4), (0, 2)), (4, 1, 2))
    assert [region.holds(number) for number in range(8)] == [False] * 2 + [True] * 2 + [False] * 4
    assert region.inner() == Region((4, 4), ((0, 4), (0, 2)), (1, 2))
    assert np.arange(16).reshape(4, 4)[2, 1] == region.inner().of(np.arange(16).reshape(4, 4))[2, 1]
