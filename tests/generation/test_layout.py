"""Weights laid out for decoding give the answers of the stacked ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import lora
from jaxlora.core.tree import flatten, replace
from jaxlora.generation.decoding import generate
from jaxlora.generation.layout import for_decoding
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.models.parameters import describe
from jaxlora.models.stacks import Apart
from jaxlora.ops.arrays import LoraArray
from jaxlora.ops.quantize import quantize

PROMPTS = [[5, 9, 2, 40, 11, 3, 7], [1], [8, 8, 30, 2, 59, 60, 4, 17, 22, 35, 6, 41]]
TWELVE = SamplingOptions(max_new_tokens=12)
QUERY = "layers/attention/q_proj/kernel"


def adapted(model, quantized=False):
    """A model's weights with a pair on every query projection that changes what it says."""
    leaves = flatten(model.params)
    if quantized:
        each = [quantize(np.asarray(layer), "nf4") for layer in leaves[QUERY]]
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        model_params = replace(model.params, {QUERY: stacked})
    else:
        model_params = model.params
    modules = {QUERY: describe(model.transformer.cfg)[QUERY].modules()}
    config = lora.LoraConfig(r=2, target_modules=("q_proj",))
    targets = lora.match(modules, config, stacked=modules)
    pairs = lora.init(model_params, targets, jax.random.key(1))
    noise = jax.random.normal(jax.random.key(2), pairs[QUERY]["b"].shape)
    pairs[QUERY]["b"] = pairs[QUERY]["b"] + noise
    return lora.apply(model_params, pairs, targets)


# Three layers, so that a layer in another's place is neither the first nor the last; the middle
# one sees less than the others.
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3, "sliding_layers": (1,)}], ids=str)
def test_layers_apart_answer_as_stacked(random_model, changes):
    model = random_model(num_layers=3, **changes)
    laid_out = for_decoding(model.params, model.transformer.cfg)
    assert isinstance(flatten(laid_out)[QUERY], Apart)
    wanted = generate(model.transformer, model.params, PROMPTS, TWELVE)
    assert generate(model.transformer, laid_out, PROMPTS, TWELVE) == wanted


def test_a_layer_apart_is_the_memory_of_its_stack(random_model):
    model = random_model(embed_dim=32, num_heads=4, head_dim=8)  # each layer starts at 64 bytes
    stack = flatten(model.params)[QUERY]
    layers = flatten(for_decoding(model.params, model.transformer.cfg))[QUERY].layers
    start, size = stack.unsafe_buffer_pointer(), stack[0].nbytes
    assert [layer.unsafe_buffer_pointer() for layer in layers] == [start, start + size]


def test_a_pair_on_a_plain_base_is_added_to_it(random_model):
    model = random_model()
    params = adapted(model)
    laid_out = for_decoding(params, model.transformer.cfg)
    assert not any(isinstance(leaf, LoraArray) for leaf in flatten(laid_out).values())
    wanted = generate(model.transformer, params, PROMPTS, TWELVE)
    assert wanted != generate(model.transformer, model.params, PROMPTS, TWELVE)
    assert generate(model.transformer, laid_out, PROMPTS, TWELVE) == wanted


def test_a_quantized_base_stays_quantized_under_its_pair(random_model):
    model = random_model(embed_dim=64)
    params = adapted(model, quantized=True)
    laid_out = for_decoding(params, model.transformer.cfg)
    held = {leaf.dtype for leaf in jax.tree.leaves(flatten(laid_out)[QUERY].base)}
    assert jnp.dtype("uint8") in held
    wanted = generate(model.transformer, params, PROMPTS, TWELVE)
    assert generate(model.transformer, laid_out, PROMPTS, TWELVE) == wanted
