"""Adapters on fused experts and routers (PEFT's ``target_parameters``), through PEFT and back."""

import copy
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from safetensors.numpy import load_file

from jaxlora.checkpoints.load import QuantSpec, load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter, save_adapter
from jaxlora.checkpoints.peft_base import refuse_unloadable
from jaxlora.checkpoints.save import save_model
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.lora import LoraConfig, apply, count, init
from jaxlora.models.parameters import describe
from jaxlora.models.targets import targets_of_specs
from jaxlora.models.transformer import Transformer, bind
from jaxlora.ops.loss import chunked_cross_entropy

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# Of seed 0 one token's logits magnify a rounding of the weights three times as much as the others'.
TOKENS = np.random.default_rng(1).integers(3, 61, (2, 19))
# float32 on both sides; a few layers of another order of summation.
LOGITS = 2e-5
# float32 sums of some thousand terms in another order, relative to the gradient's size.
GRADIENTS = 1e-4
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OPTIONS = {
    "mixtral": {"target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH},
    "qwen2-moe, mixed layers": {
        "target_modules": ["v_proj"],
        "target_parameters": ["experts.down_proj", "mlp.gate.weight"],
        "use_rslora": True,
    },
    "qwen3-moe, mixed layers": {
        "target_modules": "all-linear",  # which PEFT turns into experts and router, too
    },
    "deepseek-v2-lite": {
        "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        "target_parameters": ["gate_up_proj"],
    },
    "deepseek-v2": {
        "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 2, r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
        "alpha_pattern": {"gate_up_proj": 5},
    },
    "deepseek-v3": {
        "target_modules": ["q_a_proj", "kv_b_proj"],
        "target_parameters": ["model.layers.2.mlp.experts.down_proj"],
    },
    "gpt-oss": {"target_modules": [], "target_parameters": BOTH},
}
FAST = ("mixtral", "gpt-oss")
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.oracle) for name in OPTIONS]


class Subject:
    """One model with a random adapter of PEFT's, and both as ours."""

    def __init__(self, make_case, name, folder):
        self.folder = folder
        pair = make_case(CASES[name])
        self.base, self.cfg, self.params = pair.torch_model, pair.cfg, pair.params
        self.specs = describe(self.cfg)
        config = peft.LoraConfig(r=4, lora_alpha=8, **OPTIONS[name])
        self.peft = peft.get_peft_model(copy.deepcopy(pair.torch_model), config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in self.peft.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.peft.save_pretrained(folder / "peft")
        self.adapter, self.targets, self.config = load_adapter(folder / "peft", self.specs)

    def gradient(self):
        """PEFT's loss and gradient, the latter read as if it were an adapter."""
        model = copy.deepcopy(self.peft)
        loss = model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.grad)
        model.save_pretrained(self.folder / "gradient")
        return loss.item(), load_adapter(self.folder / "gradient", self.specs)[0]

    @functools.cached_property
    def evaluate(self):
        """``evaluate(adapter, params) -> ((loss, logits), gradient)``."""
        tokens = jnp.asarray(TOKENS)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        weights = jnp.ones(tokens.shape).at[:, -1].set(0.0)

        def loss(adapter, params):
            model = bind(Transformer(self.cfg), apply(params, adapter, self.targets))
            hidden, _ = model(tokens, positions, jnp.ones_like(tokens))
            following = jnp.roll(tokens, -1, axis=1)
            total = chunked_cross_entropy(
                model.logits, hidden, following, weights, chunk_tokens=tokens.size
            )
            return total / weights.sum(), model.logits(hidden)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def subject_of(make_case, tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Subject(make_case, name, tmp_path_factory.mktemp("subject"))
        return made[name]

    return get


def assert_gradients_equal(ours, wanted):
    wanted = flatten(wanted)
    for path, leaf in flatten(ours).items():
        size = np.linalg.norm(wanted[path])
        assert size > 1e-5, path
        assert np.linalg.norm(leaf - wanted[path]) <= GRADIENTS * size, path


@pytest.mark.parametrize("name", EACH)
def test_logits_loss_and_gradients_equal_peft(subject_of, name):
    subject = subject_of(name)
    loss, wanted = subject.gradient()
    (ours, logits), gradient = subject.evaluate(subject.adapter, subject.params)
    expected = torch_logits(subject.peft)
    assert np.abs(expected - torch_logits(subject.base)).max() > 0.005
    np.testing.assert_allclose(logits, expected, atol=LOGITS)
    assert abs(float(ours) - loss) <= 1e-5 * loss
    assert_gradients_equal(gradient, wanted)
    assert count(subject.targets, subject.adapter) == subject.peft.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", EACH)
def test_adapter_comes_back_to_peft_bit_for_bit(subject_of, name, tmp_path):
    subject = subject_of(name)
    save_adapter(
        tmp_path, subject.adapter, subject.targets, subject.config, base_name=str(subject.folder)
    )
    theirs = load_file(subject.folder / "peft" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        again = peft.PeftModel.from_pretrained(copy.deepcopy(subject.base), tmp_path).eval()
    np.testing.assert_allclose(torch_logits(again), torch_logits(subject.peft), atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v2"])
def test_merged_model_in_transformers_has_the_logits_of_base_and_adapter(
    subject_of, name, tmp_path
):
    subject = subject_of(name)
    subject.base.save_pretrained(tmp_path / "base")
    adapted = apply(subject.params, subject.adapter, subject.targets)
    save_model(adapted, subject.cfg, tmp_path / "merged", source_folder=tmp_path / "base")
    model, loading = type(subject.base).from_pretrained(
        tmp_path / "merged",
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    np.testing.assert_allclose(torch_logits(model), torch_logits(subject.peft), atol=LOGITS)


@pytest.mark.oracle
@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_quantized_experts_train_as_their_dequantized_values(subject_of, name, format, tmp_path):
    subject = subject_of(name)
    subject.base.save_pretrained(tmp_path / "base")
    cfg, _ = read_model_config(tmp_path / "base")
    leaves = load_params(
        tmp_path / "base", cfg, dtype="float32", quantization=QuantSpec(format, group_size=8)
    )
    save_model(leaves, cfg, tmp_path / "plain", source_folder=tmp_path / "base")
    plain = load_params(tmp_path / "plain", cfg, dtype="float32")
    (_, logits), gradient = subject.evaluate(subject.adapter, leaves)
    (_, wanted), of_plain = subject.evaluate(subject.adapter, plain)
    assert np.abs(wanted - subject.evaluate(subject.adapter, subject.params)[0][1]).max() > 0.01
    np.testing.assert_allclose(logits, wanted, atol=LOGITS)
    assert_gradients_equal(gradient, of_plain)


def test_our_rules_select_what_peft_selects(subject_of):
    subject = subject_of("mixtral")
    config = LoraConfig(
        r=4, alpha=8, target_modules=("q_proj", "o_proj"), target_parameters=tuple(BOTH)
    )
    assert targets_of_specs(subject.specs, config) == subject.targets


BESIDE = ["qwen3-moe, mixed layers", "qwen2-moe, mixed layers", "deepseek-v2-lite", "deepseek-v3"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.oracle] * (each != BESIDE[0])) for each in BESIDE],
)
def test_linear_layers_beside_experts_go_to_peft(make_case, name, tmp_path):
    """PEFT takes the names of dense and shared MLPs for experts, if they are given as modules."""
    pair = make_case(CASES[name])
    specs, config = describe(pair.cfg), LoraConfig(r=4, alpha=8, dropout=0.1)
    targets = targets_of_specs(specs, config)
    assert any("gate_proj" in path for path in targets)
    rng = np.random.default_rng(0)
    adapter = {
        path: {
            part: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for part, x in each.items()
        }
        for path, each in init(pair.params, targets, jax.random.key(0)).items()
    }
    save_adapter(tmp_path, adapter, targets, config, base_name="base", specs=specs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        theirs = peft.PeftModel.from_pretrained(pair.torch_model, tmp_path).eval()
    adapted = dataclasses.replace(pair, params=apply(pair.params, adapter, targets))
    wanted = torch_logits(theirs.double())
    np.testing.assert_allclose(adapted.logits(TOKENS), wanted, atol=LOGITS)
    again, read, _ = load_adapter(tmp_path, specs)
    assert {path: target.modules for path, target in read.items()} == {
        path: target.modules for path, target in targets.items()
    }
    for path, leaf in flatten(again).items():
        np.testing.assert_array_equal(leaf, flatten(adapter)[path], err_msg=path)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_linear_layers_beside_experts_with_what_peft_lacks_there_are_refused(option, make_case):
    specs = describe(make_case(CASES["qwen3-moe, mixed layers"]).cfg)
    config = LoraConfig(r=4, alpha=8, **{option: True})
    message = rf"peft_{option}: .*gate_proj.*experts.*\(k_proj, o_proj, q_proj, v_proj\)"
    with pytest.raises(UserError, match=message):
        refuse_unloadable(specs, targets_of_specs(specs, config), config)
    attention = dataclasses.replace(config, target_modules=("k_proj", "q_proj"))
    refuse_unloadable(specs, targets_of_specs(specs, attention), attention)
