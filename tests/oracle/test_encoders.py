"""Encoders against transformers and PEFT: padding, old files, gradients, adapters, merging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter, save_adapter
from jaxlora.checkpoints.save import save_model
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.lora import LoraConfig, apply, init, match
from jaxlora.models.families.read import read_config
from jaxlora.models.parameters import describe
from jaxlora.models.transformer import Transformer, bind
from jaxlora.ops.loss import chunked_cross_entropy

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

ENCODERS = [name for name, case in CASES.items() if case.family.endswith("ForMaskedLM")]
NAMED = ["bert", "roberta", "modernbert"]
# float32 on both sides; a few layers of another order of summation.
TOLERANCE = 2e-5
LENGTHS = (17, 29, 8)


def padded(cfg):
    """Three texts of `LENGTHS` with padding on the right: tokens, positions, segments."""
    tokens = np.random.default_rng(1).integers(3, 61, (len(LENGTHS), max(LENGTHS)))
    real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    pad = cfg.position_offset - 1 if cfg.position_offset else 0
    return np.where(real, tokens, pad), np.where(real, np.arange(max(LENGTHS)), 0), real.astype(int)


def logits_of(cfg, params, tokens, positions, segments, types=None):
    def run(params):
        model = bind(Transformer(cfg), params)
        return model.logits(model(tokens, positions, segments, types=types)[0])

    return np.asarray(jax.jit(run)(params))


def torch_logits(model, tokens, segments, **more):
    with torch.no_grad():
        return model(
            torch.tensor(tokens), attention_mask=torch.tensor((segments > 0) * 1), **more
        ).logits.numpy()


@pytest.mark.parametrize("name", ENCODERS)
def test_padded_logits_equal_transformers(make_case, name):
    pair = make_case(CASES[name], 3)
    tokens, positions, segments = padded(pair.cfg)
    wanted = torch_logits(pair.torch_model, tokens, segments)
    got = logits_of(pair.cfg, pair.params, jnp.array(tokens), positions, segments)
    real = segments > 0
    np.testing.assert_allclose(got[real], wanted[real], atol=TOLERANCE)


def test_packed_texts_give_the_logits_they_give_alone(make_case):
    pair = make_case(CASES["modernbert"], 4)
    tokens, positions, segments = padded(pair.cfg)
    wanted = torch_logits(pair.torch_model, tokens, segments)
    real = segments > 0
    number = np.broadcast_to(np.arange(1, 4)[:, None], real.shape)
    packed = [x[real][None] for x in (tokens, positions, number)]
    got = logits_of(pair.cfg, pair.params, *map(jnp.array, packed))[0]
    np.testing.assert_allclose(got, wanted[real], atol=TOLERANCE)


def test_token_types_equal_transformers(make_case):
    pair = make_case(CASES["bert"], 5)
    tokens, positions, segments = padded(pair.cfg)
    types = (positions > 5) * segments
    wanted = torch_logits(pair.torch_model, tokens, segments, token_type_ids=torch.tensor(types))
    got = logits_of(pair.cfg, pair.params, jnp.array(tokens), positions, segments, types)
    np.testing.assert_allclose(got[segments > 0], wanted[segments > 0], atol=TOLERANCE)
    plain = logits_of(pair.cfg, pair.params, jnp.array(tokens), positions, segments)
    assert np.abs(got - plain).max() > 0.1


MUTATIONS = {
    "bert": [
        {"causal": True},
        {"head_activation": "relu"},
        {"norm_eps": 1e-2},
        {"activation": "relu"},
        {"norm": "rms"},
    ],
    "roberta": [{"position_offset": 1}],
    "modernbert": [
        {"sliding_window": 4},
        {"sliding_layers": (0, 1, 2)},
        {"local_rope_theta": None},
        {"rope_theta": 1e4},
        {"causal": True},
        {"qkv_layout": "grouped"},
        {"head_activation": "tanh"},
    ],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_field_is_noticed(make_case, name):
    pair = make_case(CASES[name])
    tokens = np.random.default_rng(0).integers(3, 61, (2, 29))
    wanted = pair.torch_logits(tokens)
    for change in MUTATIONS[name]:
        wrong = dataclasses.replace(pair.cfg, **change)
        assert wrong != pair.cfg, change
        assert np.abs(pair.logits(tokens, wrong) - wanted).max() > 10 * TOLERANCE, change


def saved(pair, folder):
    pair.torch_model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def reloaded(folder):
    cfg, _ = read_model_config(folder)
    return flatten(load_params(folder, cfg, dtype=jnp.float32))


def test_a_file_with_old_names_and_pretraining_heads_loads_the_same(make_case, tmp_path):
    pair = make_case(CASES["bert"])
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in saved(pair, tmp_path).items()
    }
    square = np.ones((24, 24), np.float32)
    extra = {
        "bert.embeddings.position_ids": np.arange(64)[None],
        "bert.pooler.dense.weight": square,
        "bert.pooler.dense.bias": square[0],
        "cls.seq_relationship.weight": square[:2],
        "cls.seq_relationship.bias": square[0, :2],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
    }
    save_file(tensors | extra, tmp_path / "model.safetensors")
    got, wanted = reloaded(tmp_path), flatten(pair.params)
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def test_a_tensor_of_another_head_is_refused(make_case, tmp_path):
    tensors = saved(make_case(CASES["roberta"]), tmp_path)
    save_file(tensors | {"qa_outputs.bias": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"qa_outputs\.bias has no place"):
        reloaded(tmp_path)


def test_an_encoder_made_a_decoder_is_refused():
    config = transformers.BertConfig(is_decoder=True, architectures=["BertForMaskedLM"])
    with pytest.raises(UserError, match="is_decoder: True is not supported"):
        read_config(config.to_dict())


CONFIG = LoraConfig(r=4, alpha=8, task_type=None)


def adapters(pair, folder):
    """The same random adapter twice: PEFT's model, and ours as ``(arrays, targets)``."""
    specs = describe(pair.cfg)
    modules = {path: spec.modules() for path, spec in specs.items() if spec.kind == "linear"}
    targets = match(modules, CONFIG, [path for path, spec in specs.items() if spec.layers])
    arrays = init(pair.params, targets, jax.random.key(0))
    rng = np.random.default_rng(0)
    for each in arrays.values():
        each["b"] = jnp.asarray(0.1 * rng.standard_normal(each["b"].shape), jnp.float32)
    save_adapter(folder, arrays, targets, CONFIG, base_name=str(folder))
    model = peft.PeftModel.from_pretrained(pair.torch_model, str(folder), is_trainable=True).eval()
    return model, arrays, targets


@pytest.fixture(scope="module", params=NAMED)
def adapted(request, make_case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    pair = make_case(CASES[request.param], 7)
    return folder, pair, *adapters(pair, folder)


def test_peft_loads_our_adapter_whole_with_our_logits(adapted):
    folder, pair, model, arrays, targets = adapted
    stored = load_file(folder / "adapter_model.safetensors")
    assert peft.get_peft_model_state_dict(model).keys() == stored.keys()
    tokens, positions, segments = padded(pair.cfg)
    wanted = torch_logits(model, tokens, segments)
    params = apply(pair.params, arrays, targets)
    got = logits_of(pair.cfg, params, jnp.array(tokens), positions, segments)
    real = segments > 0
    np.testing.assert_allclose(got[real], wanted[real], atol=2 * TOLERANCE)
    plain = logits_of(pair.cfg, pair.params, jnp.array(tokens), positions, segments)
    assert np.abs(plain - got)[real].max() > 0.1


def test_our_adapter_comes_back_bit_for_bit(adapted):
    folder, pair, _, arrays, targets = adapted
    again, targets_again, _ = load_adapter(folder, describe(pair.cfg))
    assert targets_again.keys() == targets.keys()
    for path, leaf in flatten(arrays).items():
        np.testing.assert_array_equal(flatten(again)[path], leaf, err_msg=path)


def test_loss_and_gradients_equal_peft(adapted):
    _, pair, model, arrays, targets = adapted
    tokens, positions, segments = padded(pair.cfg)
    chosen = (np.random.default_rng(2).random(tokens.shape) < 0.3) & (segments > 0)
    labels = torch.tensor(np.where(chosen, tokens, -100))
    out = model(torch.tensor(tokens), attention_mask=torch.tensor(segments), labels=labels)
    model.zero_grad()
    out.loss.backward()

    def loss_of(arrays):
        bound = bind(Transformer(pair.cfg), apply(pair.params, arrays, targets))
        hidden, _ = bound(jnp.array(tokens), positions, segments)
        weights = jnp.array(chosen, jnp.float32)
        return (
            chunked_cross_entropy(bound.logits, hidden, jnp.array(tokens), weights) / weights.sum()
        )

    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(arrays)
    assert abs(float(loss) - out.loss.item()) < 1e-5 * out.loss.item()
    wanted = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    for path, target in targets.items():
        for part in "ab":
            ours = np.asarray(gradients[path][part])
            for layer, module in enumerate(target.modules):
                key = f"base_model.model.{module}.lora_{part.upper()}.default.weight"
                mine = ours[layer] if ours.ndim == 3 else ours
                scale = np.linalg.norm(wanted[key])
                # float32 sums in another order; the first two are zero together.
                assert np.linalg.norm(mine.T - wanted[key]) <= 1e-4 * max(scale, 1e-4), key


@pytest.mark.parametrize("name", NAMED)
def test_merged_model_loads_in_transformers_with_our_logits(make_case, tmp_path, name):
    pair = make_case(CASES[name], 8)
    base, merged = tmp_path / "base", tmp_path / "merged"
    pair.torch_model.save_pretrained(base)
    specs = describe(pair.cfg)
    modules = {path: spec.modules() for path, spec in specs.items() if spec.kind == "linear"}
    targets = match(modules, CONFIG, [path for path, spec in specs.items() if spec.layers])
    arrays = init(pair.params, targets, jax.random.key(0))
    for each in arrays.values():
        each["b"] = 0.1 * jax.random.normal(jax.random.key(1), each["b"].shape)
    params = apply(pair.params, arrays, targets)
    save_model(params, pair.cfg, merged, source_folder=base)
    model, loading = transformers.AutoModelForMaskedLM.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    tokens, positions, segments = padded(pair.cfg)
    wanted = torch_logits(model.eval(), tokens, segments)
    got = logits_of(pair.cfg, params, jnp.array(tokens), positions, segments)
    np.testing.assert_allclose(got[segments > 0], wanted[segments > 0], atol=2 * TOLERANCE)
