import copy

import jax.numpy as jnp
import pytest

from jaxlora.core.errors import UserError
from jaxlora.lora import LoraConfig, match, targets_of_tree
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe

CFG = ModelConfig(
    vocab_size=17,
    embed_dim=8,
    mlp_dim=10,
    num_layers=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_context=16,
    norm_eps=1e-5,
    rope_theta=1e4,
)
LINEAR = {path: spec for path, spec in describe(CFG).items() if spec.kind == "linear"}
MODULES = {path: spec.modules() for path, spec in LINEAR.items()}


def matched(config):
    return match(MODULES, config, stacked=MODULES)


def selection(targets):
    """Returns ``{module path: (rank, scale)}`` of every adapted matrix."""
    return {
        module: (rank, scale)
        for target in targets.values()
        for module, rank, scale in zip(target.modules, target.ranks, target.scales, strict=True)
        if rank
    }


@pytest.fixture(scope="module")
def torch_model():
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.LlamaConfig(
        vocab_size=CFG.vocab_size,
        hidden_size=CFG.embed_dim,
        intermediate_size=CFG.mlp_dim,
        num_hidden_layers=CFG.num_layers,
        num_attention_heads=CFG.num_heads,
        num_key_value_heads=CFG.num_kv_heads,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(hf_config)


def peft_selection(torch_model, **fields):
    import peft

    wrapped = peft.get_peft_model(
        copy.deepcopy(torch_model), peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    )
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (module.r["default"], module.scaling["default"])
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }


Q_OR_V = ["q_proj", "v_proj"]
RULES = {
    "suffixes": {"target_modules": Q_OR_V},
    "longer suffix": {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    "exclusion of what is not targeted": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["gate_proj"],
    },
    "one whole path": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.layers\.(1|1\d)\..*(gate|up)_proj"},
    "regex must match the whole path": {"target_modules": r"model\.layers\.\d\.mlp\.up_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear less a suffix": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "exclude by regex": {"target_modules": Q_OR_V, "exclude_modules": r".*\.1\..*"},
    "exclude by path": {
        "target_modules": Q_OR_V,
        "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    },
    "layers": {"target_modules": Q_OR_V, "layers_to_transform": [1, 10]},
    "layers but a whole path": {
        "target_modules": ["q_proj", "model.layers.3.mlp.up_proj"],
        "layers_to_transform": [1],
    },
    "ranks": {"target_modules": Q_OR_V, "rank_pattern": {"q_proj": 3}},
    "ranks by layer": {
        "target_modules": Q_OR_V,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "v_proj": 5},
    },
    "first pattern wins": {
        "target_modules": Q_OR_V,
        "rank_pattern": {".*_proj": 3, "v_proj": 5},
        "alpha_pattern": {"v_proj": 7, ".*": 9},
    },
    "one-letter pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"[a-z]_proj": 3},
    },
    "pattern is anchored at a dot": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"p_proj": 3, "q_proj": 2, "up_proj": 4},
    },
    "alphas": {"target_modules": Q_OR_V, "lora_alpha": 24, "alpha_pattern": {"v_proj": 4}},
    "rslora": {
        "target_modules": Q_OR_V,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "lora_alpha": 12,
    },
}
# PEFT ignores a pattern that matches nothing; we refuse it.
REFUSED = {"pattern is anchored at a dot"}


def our_config(fields):
    names = {"lora_alpha": "alpha"}
    return LoraConfig(
        **{
            names.get(name, name): tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    )


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in REFUSED])
def test_rules_select_what_peft_selects(torch_model, rule):
    theirs = peft_selection(torch_model, **RULES[rule])
    assert selection(matched(our_config(RULES[rule]))) == theirs


def test_a_pattern_that_matches_nothing_is_refused_though_peft_ignores_it(torch_model):
    fields = RULES["pattern is anchored at a dot"]
    ranks = {name: rank for name, (rank, _) in peft_selection(torch_model, **fields).items()}
    assert set(ranks.values()) == {2, 4}
    with pytest.raises(UserError, match="rank_pattern: 'p_proj' matches no module"):
        matched(our_config(fields))


@pytest.mark.parametrize("target", [("q_proj",), r".*q_proj", "all-linear"])
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_unmatched_pattern_is_refused_whatever_the_form_of_the_targets(target, name):
    with pytest.raises(UserError, match=f"{name}: 'k_prj' matches no module"):
        matched(LoraConfig(target_modules=target, **{name: {"k_prj": 4}}))


def test_unmatched_suffix_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match=r"'q_prj' matches no module\. Did you mean \"q_proj\"\?"):
        matched(LoraConfig(target_modules=("v_proj", "q_prj")))
    with pytest.raises(UserError, match="Modules: down_proj, gate_proj"):
        matched(LoraConfig(target_modules=("zzz",)))


def test_a_suffix_is_no_substring():
    with pytest.raises(UserError, match="'proj' matches no module"):
        matched(LoraConfig(target_modules=("proj",)))


def test_unmatched_or_bad_regex_is_refused():
    with pytest.raises(UserError, match=r"matches no module path such as 'model\.layers\.0"):
        matched(LoraConfig(target_modules="q_proj"))
    with pytest.raises(UserError, match="bad regular expression"):
        matched(LoraConfig(target_modules="(q_proj"))


@pytest.mark.parametrize("target", [("q_proj",), r".*q_proj"])
def test_a_layer_that_does_not_exist_is_refused(target):
    with pytest.raises(UserError, match=r"no layer 12; the model has from 0 to 11"):
        matched(LoraConfig(target_modules=target, layers_to_transform=(0, 12)))


def test_an_exclusion_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"exclude_modules: 'down_prj'.*\"down_proj\""):
        matched(LoraConfig(exclude_modules=("down_prj",)))


def test_excluding_everything_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        matched(LoraConfig(target_modules=("q_proj",), exclude_modules=("q_proj",)))


def test_arrays_are_as_wide_as_the_widest_layer():
    config = LoraConfig(
        r=2, target_modules=("q_proj",), rank_pattern={r"layers\.3\.self_attn\.q_proj": 5}
    )
    (target,) = matched(config).values()
    assert target.ranks == (2, 2, 2, 5, *[2] * 8)
    assert target.rank == 5
    assert target.stacked


TREE = {
    "embed": {"embedding": jnp.zeros((11, 6))},
    "attention": {
        "query": {"kernel": jnp.zeros((6, 2, 3)), "bias": jnp.zeros((2, 3))},
        "out": {"kernel": jnp.zeros((2, 3, 6))},
    },
    "dense": {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)},
    "torch_like": {"weight": jnp.zeros((4, 6))},
    "bare": jnp.zeros((6, 6)),
    "norm": {"scale": jnp.zeros(6)},
}


def test_all_linear_in_a_third_party_tree_takes_the_matrices():
    targets = targets_of_tree(TREE, LoraConfig(r=2))
    assert selection(targets) == {
        "dense": (2, 4.0),
        "torch_like": (2, 4.0),
        "bare": (2, 4.0),
    }


def test_kernels_with_more_axes_are_adapted_by_name():
    config = LoraConfig(target_modules=("query", "attention.out", "embed"))
    targets = targets_of_tree(TREE, config, in_axes={"out": 2})
    assert {path: target.in_axes for path, target in targets.items()} == {
        "embed/embedding": 1,
        "attention/query/kernel": 1,
        "attention/out/kernel": 2,
    }
    assert not any(target.stacked for target in targets.values())


def test_unmatched_in_axes_is_refused():
    with pytest.raises(UserError, match="in_axes: 'ouput'"):
        targets_of_tree(TREE, LoraConfig(target_modules=("out",)), in_axes={"ouput": 2})
