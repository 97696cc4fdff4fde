import dataclasses

from jaxlora.models.config import ModelConfig, Moe
from jaxlora.models.parameters import describe
from jaxlora.models.stacks import make_stacks
from jaxlora.ops.experts import Routing

CFG = ModelConfig(
    vocab_size=8,
    embed_dim=4,
    mlp_dim=8,
    num_layers=7,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_context=16,
    norm_eps=1e-5,
    family="Qwen3MoeForCausalLM",
)


def sparse(*layers):
    moe = Moe(layers, num_experts=3, mlp_dim=2, routing=Routing(1))
    return dataclasses.replace(CFG, moe=moe)


def test_like_layers_are_one_stack():
    for cfg in (CFG, sparse(*range(7))):
        assert [stack.names for stack in make_stacks(cfg)] == [("layers",)]


def test_dense_layers_first_make_two_stacks():
    first, rest = make_stacks(sparse(3, 4, 5, 6))
    assert (first.layers, rest.layers) == (((0, 1, 2),), ((3, 4, 5, 6),))
    assert [shape.experts for stack in (first, rest) for shape in stack.shapes] == [False, True]


def test_alternating_layers_are_scanned_as_a_period():
    period, last = make_stacks(sparse(1, 3, 5))
    assert period.names == ("layers_0", "layers_1")
    assert period.layers == ((0, 2, 4), (1, 3, 5))
    assert last.layers == ((6,),)


def test_every_layer_has_its_own_tensors_whatever_the_stack():
    names = [
        name
        for spec in describe(sparse(1, 3, 5)).values()
        for group in spec.sources().values()
        for name in group
    ]
    assert len(names) == len(set(names))
    for layer in range(7):
        has_experts = f"model.layers.{layer}.mlp.experts.2.up_proj.weight" in names
        assert has_experts == (layer in (1, 3, 5))
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in names) != has_experts
