"""Adapters on a base that has got new tokens, from PEFT to us and back.

Such a file brings the resized tables along, trained or not: whoever loads it has only to give the
base as many rows. Tensors stay the same bits; logits are PEFT's to float32 rounding.
"""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
from family_cases import CASES
from safetensors.numpy import load_file

from jaxlora.checkpoints.adapter import LoadedAdapter, read_adapter, tensors_beside
from jaxlora.checkpoints.fitted import load_base
from jaxlora.checkpoints.load import read_model_config
from jaxlora.checkpoints.peft import save_adapter
from jaxlora.core.errors import UserError
from jaxlora.models.parameters import describe
from jaxlora.models.task import task_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

OLD, NEW = 61, 66
TOKENS = np.concatenate(
    [np.random.default_rng(0).integers(3, NEW, (2, 10)), [[61, 63, 65], [64, 62, 61]]], axis=1
)
# float32, 3 layers, logits of standard deviation about 1: both sides sum in their own order.
TOLERANCE = 1e-4
FORGOTTEN_BIAS = ".token_adapter.base_layer.bias"
# What to adapt, and the names of embedding, head and a norm.
MODULES = {
    "llama 2, gqa": ("q_proj", "embed_tokens", "lm_head", "model.norm"),
    "gemma": (
        "q_proj",
        "embed_tokens",
        "lm_head",
        "model.norm",
    ),  # tied, and the embedding is scaled
    "gpt-2": ("c_attn", "wte", "lm_head", "ln_f"),
    "phi-2": ("q_proj", "embed_tokens", "lm_head", "final_layernorm"),  # a head with a bias
    "pythia": ("query_key_value", "embed_in", "lm_head", "final_layer_norm"),
    "bert": ("query", "word_embeddings", "cls.predictions.decoder", "attention.output.LayerNorm"),
    "bert, untied, relu": (
        "query",
        "word_embeddings",
        "cls.predictions.decoder",
        "attention.output.LayerNorm",
    ),
}
VARIANTS = {
    "frozen": lambda target, embedding, head, norm: {},
    "whole": lambda target, embedding, head, norm: {"modules_to_save": [embedding, head]},
    "norms": lambda target, embedding, head, norm: {"modules_to_save": [norm]},
    "whole embedding": lambda target, embedding, head, norm: {"modules_to_save": [embedding]},
    "rows": lambda target, embedding, head, norm: {"trainable_token_indices": [62, 65]},
    "rows of both": lambda target, embedding, head, norm: {
        "trainable_token_indices": {embedding: [62, 65], head: [61, 62]}
    },
    "pair on embedding": lambda target, embedding, head, norm: {
        "target_modules": [target, embedding]
    },
}
QUICK = {("gemma", "rows"), ("phi-2", "frozen")}
# PEFT forgets an untied head where a pair is on a module called embed_tokens.
FORGOTTEN = {("llama 2, gqa", "pair on embedding"), ("phi-2", "pair on embedding")}
CELLS = [
    pytest.param((case, variant), marks=() if (case, variant) in QUICK else pytest.mark.oracle)
    for case in MODULES
    for variant in VARIANTS
    if (case, variant) not in FORGOTTEN
]


@dataclasses.dataclass
class Trip:
    """One adapter: made by PEFT, read here, written here, read by PEFT."""

    folder: Any
    theirs: np.ndarray
    again: np.ndarray
    plain: np.ndarray
    adapter: LoadedAdapter
    base: Any


def hf_model(folder, seed):
    """The base with rows for the new tokens, random ones: the adapter has them."""
    import transformers

    cfg, _ = read_model_config(folder)
    model = getattr(transformers, task_of(cfg).auto_class).from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    torch.manual_seed(seed)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def move(model):
    """Gives every trained number, and all of the new rows, a value that shows in the logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.add_(0.1 * torch.randn(weight.shape))
            elif weight.shape[0] == NEW:
                weight[OLD:] += 0.2 * torch.randn(weight[OLD:].shape)


def train_with_peft(base, folder, case, variant):
    """Returns the model with an adapter, saved in `folder`, and the logits it had before."""
    names, (stored, _) = MODULES[case], read_model_config(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": [names[0]], **VARIANTS[variant](*names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, of tables that are saved
        model = hf_model(base, 1)
        plain = logits_of(model)
        config = peft.LoraConfig(task_type=task_of(stored).peft, **options)
        model = peft.get_peft_model(model, config).eval()
        move(model)
        model.save_pretrained(folder)
    return model, plain


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: " - ".join(cell))
def trip(request, make_case, tmp_path_factory):
    home = tmp_path_factory.mktemp("trip")
    base = home / "base"
    make_case(CASES[request.param[0]], folder=base)
    stored, _ = read_model_config(base)
    model, plain = train_with_peft(base, home / "theirs", *request.param)
    adapter = read_adapter(home / "theirs", stored)
    save_adapter(
        home / "ours",
        adapter.pairs,
        adapter.targets,
        adapter.config,
        base_name=str(base),
        specs=describe(adapter.cfg),
        beside=tensors_beside(
            adapter.cfg, stored, adapter.targets, adapter.parts, adapter.params, adapter.tables
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        warnings.filterwarnings("ignore", message=".*tie.*")
        back = peft.PeftModel.from_pretrained(hf_model(base, 2), home / "ours").eval()
    params = load_base(base, stored, adapter.cfg, dtype="float32", trained=adapter.parts)
    return Trip(home, logits_of(model), logits_of(back), plain, adapter, params)


def test_new_tokens_of_peft_have_its_logits_here(trip):
    from pairs import run_decoder

    assert trip.adapter.cfg.vocab_size == NEW
    ours = run_decoder(trip.adapter.cfg, trip.adapter.on(trip.base), TOKENS)
    # PEFT's layer for single rows of a head leaves out its bias (peft 0.21.2).
    ours -= sum(x for key, x in tensors(trip, "theirs").items() if key.endswith(FORGOTTEN_BIAS))
    np.testing.assert_allclose(ours, trip.theirs, atol=TOLERANCE)
    assert np.abs(trip.theirs - trip.plain)[:, -3:].max() > 0.1


def test_new_tokens_saved_here_have_their_logits_in_peft(trip):
    np.testing.assert_allclose(trip.again, trip.theirs, atol=TOLERANCE)


def tensors(trip, which):
    return load_file(trip.folder / which / "adapter_model.safetensors")


def test_tensors_are_the_same_bits_in_both_files(trip):
    theirs, ours = tensors(trip, "theirs"), tensors(trip, "ours")
    # A tied head that PEFT leaves to the base, which it shares the embedding's numbers with.
    shared = next((x for k, x in theirs.items() if k.endswith("embed_tokens.base_layer.weight")), 0)
    for key, values in ours.items():
        np.testing.assert_array_equal(values, theirs.get(key, shared), err_msg=key)
    # PEFT writes the head of a tied model again, and what whole modules have taken the place of.
    for key in (key for key in theirs.keys() - ours.keys() if "original_module" not in key):
        alike = [x for x in ours.values() if x.shape == theirs[key].shape]
        assert any((theirs[key] == x).all() for x in alike), key


@pytest.mark.oracle
@pytest.mark.parametrize(("case", "variant"), sorted(FORGOTTEN))
def test_an_adapter_without_the_rows_of_the_head_is_refused(case, variant, make_case, tmp_path):
    make_case(CASES[case], folder=tmp_path / "base")
    train_with_peft(tmp_path / "base", tmp_path / "theirs", case, variant)
    stored, _ = read_model_config(tmp_path / "base")
    with pytest.raises(UserError, match=r"for 66 tokens, its base has 61, .*new rows of lm_head"):
        read_adapter(tmp_path / "theirs", stored)
