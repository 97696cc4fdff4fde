"""Adapters and merged models through real PEFT and transformers, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter
from jaxlora.checkpoints.save import save_model
from jaxlora.lora import LoraConfig, apply, init, match
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(3, 97, (2, 13))
# float32, 3 layers, logits of standard deviation about 1: both sides sum in their own order.
# Measured 2e-6 to 4e-6; an adapter left out or a wrong scale costs 0.1 and more.
TOLERANCE = 1e-4

CONFIGS = {
    "all": LoraConfig(r=4, alpha=8),
    "dora": LoraConfig(r=4, alpha=8, use_dora=True, target_modules=("v_proj", "down_proj")),
    "lora_bias": LoraConfig(r=4, lora_bias=True, target_modules=("q_proj", "v_proj")),
}


@pytest.fixture(scope="module")
def base(tiny_llama):
    folder = tiny_llama(attention_bias=True)
    cfg, _ = read_model_config(folder)
    return folder, cfg, load_params(folder, cfg, dtype="float32"), describe(cfg)


def hf_model(folder):
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert not any(loading.values()), loading
    return model.eval()


def hf_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def our_logits(base):
    _, cfg, _, _ = base

    def forward(params):
        tokens = jnp.asarray(TOKENS)
        positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        model = bind(Transformer(cfg), params)
        return model.logits(model(tokens, positions, jnp.ones_like(tokens))[0])

    return jax.jit(forward)


def random_adapter(base, config):
    _, _, params, specs = base
    kinds = ("linear",) if config.target_modules == "all-linear" else ("linear", "head")
    modules = {path: spec.modules() for path, spec in specs.items() if spec.kind in kinds}
    targets = match(modules, config, [path for path, spec in specs.items() if spec.layers])
    adapter = init(params, targets, jax.random.key(0))
    rng = np.random.default_rng(0)
    for pair in adapter.values():
        used = np.any(np.asarray(pair["a"]) != 0, axis=-2)[..., None]
        pair["b"] = jnp.asarray(0.1 * rng.standard_normal(pair["b"].shape) * used, jnp.float32)
        if "magnitude" in pair:
            pair["magnitude"] = pair["magnitude"] * rng.uniform(0.8, 1.2, pair["magnitude"].shape)
        if "bias" in pair:
            pair["bias"] = jnp.asarray(rng.standard_normal(pair["bias"].shape), jnp.float32)
    return adapter, targets


def assert_adapter_matters(logits, plain):
    assert np.abs(np.asarray(logits) - plain).max() > 0.1


def test_adapter_in_bfloat16_imports_with_its_logits(base, our_logits, tmp_path):
    folder, _, params, specs = base
    model = hf_model(folder)
    plain = hf_logits(model)
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "up_proj"], use_dora=True)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    trained = {key: weight for key, weight in model.named_parameters() if "lora_" in key}
    with torch.no_grad():
        for key, weight in trained.items():
            if "lora_B" in key:
                weight.normal_(0, 0.1)
            # What a bfloat16 file can hold, so that both sides agree.
            weight.copy_(weight.to(torch.bfloat16))
    expected = hf_logits(model)
    for weight in trained.values():
        weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    adapter, targets, _ = load_adapter(tmp_path, specs)
    ours = our_logits(apply(params, adapter, targets))
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)
    assert_adapter_matters(ours, plain)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_our_merged_model_with_base_plus_adapter_logits(
    base, our_logits, tmp_path, name
):
    folder, cfg, params, _ = base
    adapter, targets = random_adapter(base, CONFIGS[name])
    adapted = apply(params, adapter, targets)
    save_model(adapted, cfg, tmp_path / "merged", source_folder=folder, max_shard_bytes=60_000)
    ours = our_logits(adapted)
    np.testing.assert_allclose(hf_logits(hf_model(tmp_path / "merged")), ours, atol=TOLERANCE)
    assert_adapter_matters(ours, np.asarray(our_logits(params)))


def test_transformers_loads_a_tied_model_that_we_saved(tiny_llama, tmp_path):
    folder = tiny_llama(tie_word_embeddings=True)
    cfg, _ = read_model_config(folder)
    params = load_params(folder, cfg, dtype="float32")
    save_model(params, cfg, tmp_path / "again", source_folder=folder)
    expected = hf_logits(hf_model(folder))
    np.testing.assert_array_equal(hf_logits(hf_model(tmp_path / "again")), expected)
