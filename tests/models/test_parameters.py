import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.lora.parts import whole_modules
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import describe, init_params

CFG = ModelConfig(
    vocab_size=31,
    embed_dim=12,
    mlp_dim=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_context=16,
    norm_eps=1e-5,
    rope_theta=1e4,
)
BIASED = ModelConfig(**{**vars(CFG), "qkv_bias": True, "output_bias": True, "mlp_bias": True})
TIED = ModelConfig(**{**vars(CFG), "tie_embedding": True})


def test_paths_and_shapes_are_the_documented_ones():
    assert {path: spec.full_shape for path, spec in describe(CFG).items()} == {
        "embed/embedding": (31, 12),
        "layers/attention_in_norm/scale": (3, 12),
        "layers/mlp_in_norm/scale": (3, 12),
        "layers/attention/q_proj/kernel": (3, 12, 24),
        "layers/attention/k_proj/kernel": (3, 12, 12),
        "layers/attention/v_proj/kernel": (3, 12, 12),
        "layers/attention/o_proj/kernel": (3, 24, 12),
        "layers/mlp/gate_proj/kernel": (3, 12, 20),
        "layers/mlp/up_proj/kernel": (3, 12, 20),
        "layers/mlp/down_proj/kernel": (3, 20, 12),
        "norm/scale": (12,),
        "lm_head/kernel": (12, 31),
    }


def test_tied_model_has_no_head_and_biases_are_described():
    assert set(describe(CFG)) - set(describe(TIED)) == {"lm_head/kernel"}
    extra = {path: spec for path, spec in describe(BIASED).items() if path not in describe(CFG)}
    assert len(extra) == 7
    assert {spec.kind for spec in extra.values()} == {"bias"}
    assert extra["layers/mlp/up_proj/bias"].full_shape == (3, 20)


@pytest.mark.parametrize("cfg", [CFG, BIASED, TIED], ids=["plain", "biased", "tied"])
def test_names_and_shapes_are_those_of_transformers(cfg):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.embed_dim,
        intermediate_size=cfg.mlp_dim,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        attention_bias=cfg.qkv_bias,
        mlp_bias=cfg.mlp_bias,
        tie_word_embeddings=cfg.tie_embedding,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    described = {
        name: spec.tensor_shape
        for spec in describe(cfg).values()
        for names in spec.sources().values()
        for name in names
    }
    assert described == wanted


def test_every_axis_of_every_parameter_is_named():
    for path, spec in describe(BIASED).items():
        assert len(spec.axes) == len(spec.shape), path


def test_kinds_say_what_may_be_quantized_and_adapted():
    kinds = {}
    for path, spec in describe(CFG).items():
        kinds.setdefault(spec.kind, set()).add(path.split("/")[-2])
    assert kinds == {
        "embedding": {"embed"},
        "norm": {"attention_in_norm", "mlp_in_norm", "norm"},
        "head": {"lm_head"},
        "linear": {
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        },
    }


def test_modules_are_the_paths_that_adapters_name():
    spec = describe(CFG)["layers/attention/q_proj/kernel"]
    assert spec.modules() == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    assert describe(CFG)["lm_head/kernel"].modules() == ["lm_head"]
    assert spec.size == 3 * 12 * 24


def test_fresh_parameters_follow_their_descriptions():
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default generator
    fresh = jax.jit(init_params, static_argnums=(0, 2))(BIASED, key, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("bfloat16")}
    params = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(fresh).items()}
    specs = describe(BIASED)
    assert set(params) == set(specs)
    for path, spec in specs.items():
        leaf = params[path]
        assert leaf.shape == spec.full_shape
        if spec.kind == "norm":
            assert (leaf == 1).all()
        elif spec.kind == "bias":
            assert (leaf == 0).all()
        else:
            # 0.02 from at least 372 draws: sampling error of a standard deviation is below 4 %.
            assert abs(float(leaf.std()) / 0.02 - 1) < 0.15, path
    matrices = [
        params[p] for p in ("layers/attention/k_proj/kernel", "layers/attention/v_proj/kernel")
    ]
    assert not (matrices[0] == matrices[1]).all()
    assert not (matrices[0][0] == matrices[0][1]).all()


def test_norms_of_single_heads_are_of_the_module_that_holds_them():
    fields = {"family": "StableLmForCausalLM", "norm": "layer", "qk_norm": "each_head"}
    specs = describe(ModelConfig(**{**vars(CFG), **fields}))
    spec = specs["layers/attention/q_norm/scale"]
    assert spec.modules()[1] == "model.layers.1.self_attn.q_layernorm.norms"
    assert spec.sources()[1, 3] == ("model.layers.1.self_attn.q_layernorm.norms.3.weight",)
    assert whole_modules(specs, ["lm_head"]).keys() == {"lm_head/kernel"}
    with pytest.raises(UserError, match=r"q_layernorm\.norms is made up of several tensors"):
        whole_modules(specs, ["q_layernorm"])
