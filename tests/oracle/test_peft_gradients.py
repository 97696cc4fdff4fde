"""Loss, gradients and merged weights of LoRA, rsLoRA and DoRA against PEFT, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.tree import flatten
from jaxlora.lora import LoraConfig, apply, count, init, match, merge
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind
from jaxlora.ops.loss import chunked_cross_entropy

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# float32 sums of some thousand terms, in another order.
TOLERANCE = 3e-5
# Of an adapter's numbers. At twice as much pairs weigh as much as the base, and in two of 36 cases
# gradients change some 300 times as much as weights do: no float32 could stay within the limit.
NOISE = 0.1
# How many times as much gradients may change as weights do; 10 to 70 times here.
SENSITIVITY = 150
SIZES = {
    "vocab_size": 131,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "attention_bias": True,
    "mlp_bias": True,
}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "lora": {"target_modules": EVERY, "lora_alpha": 12},
    "rslora": {"target_modules": EVERY, "lora_alpha": 5, "use_rslora": True},
    "dora": {"target_modules": EVERY, "lora_alpha": 12, "use_dora": True},
    "mixed ranks, some layers": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {r"layers\.2\.mlp\.down_proj": 6, "q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "layers_to_transform": [0, 2],
    },
    "lora_bias": {"target_modules": EVERY, "lora_bias": True},
    "some layers, dora": {
        "target_modules": ["v_proj", "up_proj"],
        "layers_to_transform": [1],
        "use_dora": True,
    },
}
QUICK = ("lora", "dora", "mixed ranks, some layers")


def our_config(fields):
    ours = {"alpha" if name == "lora_alpha" else name: value for name, value in fields.items()}
    return LoraConfig(
        **{k: tuple(value) if isinstance(value, list) else value for k, value in ours.items()}
    )


class Both:
    """The same adapter on the same model, PEFT's and ours."""

    def __init__(self, make_pair, fields, seed):
        pair = make_pair("Llama", seed, **SIZES)
        self.cfg, self.params = pair.cfg, pair.params
        modules = {p: s.modules() for p, s in describe(self.cfg).items() if s.kind == "linear"}
        fields = {"r": 4, **fields}
        self.targets = match(modules, our_config(fields), stacked=modules)
        self.peft = peft.get_peft_model(
            pair.torch_model, peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.peft.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise)
                elif "lora_" in name:
                    parameter.copy_(NOISE * noise)
        self.adapter = self.read(lambda parameter: parameter.detach())

    def read(self, value_of):
        """Our adapter tree with `value_of` each of PEFT's parameters."""
        parameters = dict(self.peft.named_parameters())
        fresh = init(self.params, self.targets, jax.random.key(0))
        return {
            path: {
                name: np.stack(
                    [
                        self._layer(parameters, value_of, path, layer, name, stack.shape[1:])
                        for layer in range(self.cfg.num_layers)
                    ]
                )
                for name, stack in pair.items()
            }
            for path, pair in fresh.items()
        }

    def _layer(self, parameters, value_of, path, layer, name, shape):
        target = self.targets[path]
        result = np.zeros(shape, np.float32)
        if target.ranks[layer]:
            suffix = {
                "a": "lora_A.default.weight",
                "b": "lora_B.default.weight",
                "magnitude": "lora_magnitude_vector.default.weight",
                "bias": "lora_B.default.bias",
            }[name]
            key = f"base_model.model.{target.modules[layer]}.{suffix}"
            value = value_of(parameters[key]).numpy().T
            result[tuple(slice(size) for size in value.shape)] = value
        return result

    def loss(self, tokens):
        tokens = jnp.asarray(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        weights = jnp.ones(tokens.shape).at[:, -1].set(0.0)

        def mean_loss(adapter):
            model = bind(Transformer(self.cfg), apply(self.params, adapter, self.targets))
            hidden, _ = model(tokens, positions, jnp.ones_like(tokens))
            total = chunked_cross_entropy(
                model.logits, hidden, jnp.roll(tokens, -1, axis=1), weights, chunk_tokens=16
            )
            return total / weights.sum()

        return mean_loss


def check_gradients(make_pair, variant, seed):
    both = Both(make_pair, VARIANTS[variant], seed)
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, 19))
    out = both.peft(torch.tensor(tokens), labels=torch.tensor(tokens))
    out.loss.backward()
    wanted = flatten(both.read(lambda parameter: parameter.grad))
    loss, gradients = jax.jit(jax.value_and_grad(both.loss(tokens)))(both.adapter)
    assert abs(float(loss) - out.loss.item()) < 1e-5 * out.loss.item()
    worst = 0.0
    for path, gradient in flatten(gradients).items():
        size = np.linalg.norm(wanted[path])
        assert size > 1e-4, path
        worst = max(worst, np.linalg.norm(gradient - wanted[path]) / size)
    assert worst <= TOLERANCE
    return worst


@pytest.mark.parametrize(
    "variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.oracle) for v in VARIANTS]
)
def test_loss_and_gradients_equal_peft(make_pair, variant):
    check_gradients(make_pair, variant, 0)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_peft_on_more_seeds(make_pair, variant, seed):
    check_gradients(make_pair, variant, seed)


class InDouble(torch.overrides.TorchFunctionMode):
    """float64 where a model asks for float32 (norms, softmax, rotary angles)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        single, double = torch.float32, torch.float64
        args = [double if each is single else each for each in args]
        kwargs = {k: double if v is single else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cases_magnify_roundings_little(make_pair, variant, seed):
    """In float64: a case that is ill-conditioned says nothing about whose float32 is right."""
    both = Both(make_pair, VARIANTS[variant], seed)
    tokens = torch.tensor(np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, 19)))
    both.peft.double()

    def gradients():
        both.peft.zero_grad()
        with InDouble():
            both.peft(tokens, labels=tokens).loss.backward()
        return flatten(both.read(lambda parameter: parameter.grad))

    before, change = gradients(), 1e-5
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in both.peft.parameters():
            parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
    for path, gradient in gradients().items():
        size = np.linalg.norm(before[path])
        assert np.linalg.norm(gradient - before[path]) <= SENSITIVITY * change * size, path


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_and_count_equal_peft(make_pair, variant):
    both = Both(make_pair, VARIANTS[variant], 1)
    assert count(both.targets, both.adapter) == both.peft.get_nb_trainable_parameters()[0]
    merged = flatten(merge(both.params, both.adapter, both.targets))
    tensors = both.peft.merge_and_unload().state_dict()
    biases = {f"{path.rpartition('/')[0]}/bias" for path in both.targets}
    for path in {*both.targets, *biases}:
        spec = describe(both.cfg)[path]
        for (layer,), (name,) in spec.sources().items():
            # One float32 rounding of values of size 1.
            np.testing.assert_allclose(merged[path][layer], tensors[name].numpy().T, atol=2e-6)
