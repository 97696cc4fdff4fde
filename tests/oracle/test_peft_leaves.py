"""What trains beside low-rank pairs, from PEFT to us and back: whole modules, tables, token rows.

Tensors stay the same bits; logits and gradients are PEFT's to float32 rounding.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from safetensors.numpy import load_file
from torch_models import logits_of

from jaxlora import lora
from jaxlora.checkpoints.adapter import LoadedAdapter, read_adapter
from jaxlora.checkpoints.fitted import load_base
from jaxlora.checkpoints.load import read_model_config
from jaxlora.checkpoints.peft import save_adapter
from jaxlora.checkpoints.whole import trained_entries, trained_tensors
from jaxlora.core.tree import flatten, unflatten
from jaxlora.lora.parts import fill
from jaxlora.models.parameters import describe
from jaxlora.models.task import NEXT_TOKEN, task_of
from jaxlora.models.transformer import Transformer, bind

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 13))
# float32, 3 layers, logits of standard deviation about 1: both sides sum in their own order.
TOLERANCE = 1e-4
# Of a gradient's own size: sums of a few hundred terms, in another order.
GRADIENT_TOLERANCE = 1e-4

# Of the variants that begin with these words; the others are of a LLaMA with biases.
TIED = "tied"
OTHER_BASES = {
    "gpt-2": CASES["gpt-2"],  # weights [in, out], a tied head
    "neox": CASES["gpt-neox, sequential"],  # q, k and v of a head in one matrix
    "bert": CASES["bert"],  # no next token; a tied head with a bias of its own
}
VARIANTS: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "head and embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"modules_to_save": ["norm"]},
    "a layer's linear": {"modules_to_save": ["1.mlp.up_proj"]},
    "linear with bias": {"modules_to_save": ["k_proj"], "use_dora": True},
    "tied: head": {"modules_to_save": ["lm_head"]},
    "tied: embedding": {"modules_to_save": ["embed_tokens"]},
    "tied: both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "pair on embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "pairs on both tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "pair on embedding, dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "pair on embedding, ranks": {
        "target_modules": ["q_proj", "embed_tokens"],
        "rank_pattern": {"embed_tokens": 6},
        "alpha_pattern": {"embed_tokens": 3},
        "use_rslora": True,
    },
    "tied: pair on embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied: pair on head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 7, 31]},
    "tokens, unsorted": {"trainable_token_indices": {"embed_tokens": [31, 4, 5]}},
    "tokens of both tables": {
        "trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [9, 7, 8]}
    },
    "tokens, whole head": {"trainable_token_indices": [5, 7], "modules_to_save": ["lm_head"]},
    "tied: tokens": {"trainable_token_indices": [5, 7, 31]},
    "gpt-2: linear, norms": {
        "target_modules": ["attn.c_attn"],
        "modules_to_save": ["1.mlp.c_fc", "ln_f"],
    },
    "gpt-2: embedding, attention": {
        "target_modules": ["mlp.c_proj"],
        "modules_to_save": ["wte", "h.1.attn"],
    },
    "neox: linear, head": {
        "target_modules": ["dense"],
        "modules_to_save": ["query_key_value", "embed_out"],
    },
    "bert: linear, norm": {
        "target_modules": ["query"],
        "modules_to_save": ["1.intermediate.dense", "embeddings.LayerNorm"],
    },
    "bert: embeddings": {
        "target_modules": ["key"],
        "modules_to_save": ["word_embeddings", "position_embeddings"],
    },
}
QUICK = ("head and embedding", "tied: head", "tied: pair on embedding", "tied: tokens")


@dataclasses.dataclass
class Trip:
    """One adapter: made by PEFT, read here, written here, read by PEFT."""

    folder: Any
    plain: np.ndarray
    theirs: np.ndarray
    again: np.ndarray
    kept_by_peft: dict[str, np.ndarray]
    adapter: LoadedAdapter
    base: dict[str, Any]
    loss: float
    gradients: dict[str, np.ndarray]


def open_model(folder, cfg):
    kind = getattr(transformers, task_of(cfg).auto_class)
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def move(model):
    """Gives every trained number a value that shows in the logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.add_(0.1 * torch.randn(weight.shape))


def loss_of(logits, xp):
    """Mean square, weighted so that no token is like another."""
    shape = tuple(logits.shape[1:])
    weights = np.linspace(0.5, 1.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return (logits * logits * xp(weights)).mean()


def gradients_of(model):
    model.zero_grad()
    loss = loss_of(model(torch.from_numpy(TOKENS)).logits, torch.from_numpy)
    loss.backward()
    prefix = ".default"
    named = model.named_parameters()
    found = {
        name.replace(".modules_to_save" + prefix, "").replace(prefix, ""): p.grad.numpy()
        for name, p in named
        if p.requires_grad and p.grad is not None
    }
    return float(loss.detach()), found


@pytest.fixture(
    scope="module",
    params=[v if v in QUICK else pytest.param(v, marks=pytest.mark.oracle) for v in VARIANTS],
)
def trip(request, tiny_llama, make_case, tmp_path_factory):
    name = request.param.partition(":")[0]
    if name in OTHER_BASES:
        folder = tmp_path_factory.mktemp("base")
        make_case(OTHER_BASES[name], folder=folder)
    else:
        folder = tiny_llama(attention_bias=name != TIED, tie_word_embeddings=name == TIED)
    stored, _ = read_model_config(folder)
    home = tmp_path_factory.mktemp("trip")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **VARIANTS[request.param]}
    # PEFT's wrapper of that task wants a model that can generate.
    options["task_type"] = "CAUSAL_LM" if task_of(stored) == NEXT_TOKEN else None
    model = open_model(folder, stored)
    plain = logits_of(model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        config = peft.LoraConfig(**options)
        model = peft.get_peft_model(model, config).eval()
        move(model)
        model.save_pretrained(home / "theirs")
    loss, gradients = gradients_of(model)

    adapter = read_adapter(home / "theirs", stored)
    specs = describe(adapter.cfg)
    save_adapter(
        home / "ours",
        adapter.pairs,
        adapter.targets,
        adapter.config,
        base_name=str(folder),
        specs=specs,
        beside=trained_tensors(specs, adapter.parts, adapter.params),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        warnings.filterwarnings("ignore", message=".*tie.*")
        back = peft.PeftModel.from_pretrained(open_model(folder, stored), home / "ours").eval()
        state = peft.get_peft_model_state_dict(back, save_embedding_layers=False)
    base = load_base(folder, stored, adapter.cfg, dtype="float32", trained=adapter.parts)
    return Trip(
        home,
        plain,
        logits_of(model, TOKENS),
        logits_of(back, TOKENS),
        {key: tensor.numpy() for key, tensor in state.items()},
        adapter,
        base,
        loss,
        gradients,
    )


def logits_here(trip, params):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    model = bind(Transformer(trip.adapter.cfg), params)
    hidden, _ = model(jnp.asarray(TOKENS), positions, jnp.ones_like(positions))
    return model.logits(hidden)


def test_adapter_made_by_peft_has_its_logits_here(trip):
    ours = logits_here(trip, trip.adapter.on(trip.base))
    np.testing.assert_allclose(ours, trip.theirs, atol=TOLERANCE)
    assert np.abs(trip.theirs - trip.plain).max() > 0.1


def test_adapter_saved_here_has_its_logits_in_peft(trip):
    np.testing.assert_allclose(trip.again, trip.theirs, atol=TOLERANCE)


def test_tensors_are_the_same_bits_in_both_files(trip):
    theirs = load_file(trip.folder / "theirs" / "adapter_model.safetensors")
    ours = load_file(trip.folder / "ours" / "adapter_model.safetensors")
    # PEFT adds the untouched table below an adapter, and a second copy of tied rows.
    extra = {key for key in theirs if "base_layer" in key or "lm_head.token_adapter" in key}
    assert ours.keys() - theirs.keys() == set()
    assert theirs.keys() - ours.keys() <= extra
    order = {key: np.argsort(ids) for key, ids in unsorted_rows(trip).items()}
    for key, values in ours.items():
        wanted = theirs[key][order[key]] if key in order else theirs[key]
        np.testing.assert_array_equal(values, wanted, err_msg=key)
        np.testing.assert_array_equal(values, trip.kept_by_peft[key], err_msg=key)


def unsorted_rows(trip):
    tokens = trip.adapter.config.trainable_token_indices
    if not isinstance(tokens, dict):
        return {}
    specs = describe(trip.adapter.cfg)
    keys = {p: key for p, _, key, _ in trained_entries(specs, trip.adapter.parts) if p in specs}
    return {
        keys[path]: next(ids for name, ids in tokens.items() if name in keys[path])
        for path, part in trip.adapter.parts.items()
        if part.by_token
    }


def test_gradients_equal_peft(trip):
    adapter, specs = trip.adapter, describe(trip.adapter.cfg)
    leaves = flatten(trip.base)
    holes = {p: None if x.whole else x.hole(leaves[p]) for p, x in adapter.parts.items()}

    def loss(trained, pairs):
        own = {path: fill(holes[path], value) for path, value in trained.items()}
        params = lora.apply(unflatten({**leaves, **own}), pairs, adapter.targets)
        return loss_of(logits_here(trip, params), jnp.asarray)

    trained = {path: jnp.asarray(value) for path, value in adapter.params.items()}
    value, (of_parts, of_pairs) = jax.jit(jax.value_and_grad(loss, (0, 1)))(trained, adapter.pairs)
    np.testing.assert_allclose(value, trip.loss, rtol=1e-5)
    order = {key: np.argsort(ids) for key, ids in unsorted_rows(trip).items()}
    seen = 0
    for key, gradient in trained_tensors(specs, adapter.parts, of_parts).items():
        wanted = trip.gradients[key][order[key]] if key in order else trip.gradients[key]
        assert_close(gradient, wanted, key)
        seen += 1
    for path, pair in of_pairs.items():
        target = adapter.targets[path]
        if target.embedding:
            stem = f"base_model.model.{target.modules[0]}.lora_embedding_"
            assert_close(pair["a"].T, trip.gradients[f"{stem}A"], path)
            assert_close(pair["b"].T, trip.gradients[f"{stem}B"], path)
            seen += 1
    assert seen or "lm_head/kernel" in adapter.targets


def assert_close(ours, theirs, name):
    size = np.linalg.norm(theirs)
    assert size > 1e-4, name
    assert np.linalg.norm(ours - theirs) <= GRADIENT_TOLERANCE * size, name
