"""Adapters with a pair for every expert by itself, as PEFT wrote them on transformers 4."""

import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
from family_cases import CASES
from safetensors.numpy import save_file
from torch_models import logits_of

from jaxlora.checkpoints.peft import load_adapter, save_adapter
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.lora import apply, merge
from jaxlora.models.parameters import describe

pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 19))
# float32 on both sides; a few layers of another order of summation.
LOGITS = 2e-5


def single_experts(specs, rank, names, holder, rng):
    """Random pairs for every expert and for q_proj, by the names of PEFT on transformers 4."""
    tensors = {}

    def pair(module, in_dim, out_dim):
        for part, shape in (("A", (rank, in_dim)), ("B", (out_dim, rank))):
            key = f"base_model.model.{module}.lora_{part}.weight"
            tensors[key] = 0.2 * rng.standard_normal(shape).astype(np.float32)

    for spec in specs.values():
        in_dim, out_dim = spec.shape[-2:] if len(spec.shape) > 1 else (0, 0)
        for module in spec.modules():
            layer = module.partition(".mlp.")[0]
            if module.endswith("q_proj"):
                pair(module, in_dim, out_dim)
            elif module.endswith("experts.gate_up_proj"):
                for expert in range(spec.shape[0]):
                    for name in names[:2]:
                        pair(f"{layer}.{holder}.{expert}.{name}", in_dim, out_dim // 2)
            elif module.endswith("experts.down_proj"):
                for expert in range(spec.shape[0]):
                    pair(f"{layer}.{holder}.{expert}.{names[2]}", in_dim, out_dim)
    return tensors


OLD = {
    "mixtral": (("w1", "w3", "w2"), "block_sparse_moe.experts"),
    "qwen3-moe": (("gate_proj", "up_proj", "down_proj"), "mlp.experts"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.oracle] * (each != "mixtral")) for each in OLD]
)
def test_an_adapter_of_every_expert_by_itself_is_what_peft_makes_of_it(make_case, name, tmp_path):
    pair, (names, holder) = make_case(CASES[name]), OLD[name]
    specs = describe(pair.cfg)
    tensors = single_experts(specs, 3, names, holder, np.random.default_rng(0))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    targets = ["q_proj", *names]
    options = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets}
    options["task_type"] = "CAUSAL_LM"
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    adapter, targets, config = load_adapter(tmp_path, specs)
    ours = dataclasses.replace(pair, params=apply(pair.params, adapter, targets)).logits(TOKENS)
    plain = pair.logits(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch_model), tmp_path).eval()
        save_adapter(tmp_path / "now", adapter, targets, config, base_name="base", specs=specs)
        again = peft.PeftModel.from_pretrained(pair.torch_model, tmp_path / "now").eval()
    wanted = logits_of(theirs, TOKENS)
    assert np.abs(wanted - plain).max() > 0.1
    np.testing.assert_allclose(ours, wanted, atol=LOGITS)
    np.testing.assert_allclose(logits_of(again, TOKENS), wanted, atol=LOGITS)


def test_an_expert_gets_its_own_product_under_rslora(make_case, tmp_path):
    """PEFT doubles alpha with the rank there, which with a scale of alpha / sqrt(r) is too much."""
    pair, (names, holder) = make_case(CASES["mixtral"]), OLD["mixtral"]
    specs = describe(pair.cfg)
    tensors = single_experts(specs, 3, names, holder, np.random.default_rng(0))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(names)}
    options |= {"use_rslora": True, "lora_dropout": 0.1}  # PEFT has no dropout for parameters
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    adapter, targets, _ = load_adapter(tmp_path, specs)
    merged, base = (flatten(x) for x in (merge(pair.params, adapter, targets), pair.params))
    path = next(p for p in targets if specs[p].modules()[0].endswith("gate_up_proj"))
    stem = f"base_model.model.model.layers.1.{holder}.4."
    products = [
        tensors[f"{stem}{name}.lora_B.weight"] @ tensors[f"{stem}{name}.lora_A.weight"]
        for name in names[:2]
    ]
    wanted = 6 / 3**0.5 * np.concatenate(products).T
    # float32 sums of 3 products, of values of size 1.
    np.testing.assert_allclose(merged[path][1, 4] - base[path][1, 4], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("experts.3.w1", r"experts.3 has no adapter of its gate matrix.*5 experts"),
        (".w3", r"experts.0 has no adapter of its up matrix"),
    ],
)
def test_an_expert_without_its_adapter_is_refused(left_out, message, make_case, tmp_path):
    names, holder = OLD["mixtral"]
    specs = describe(make_case(CASES["mixtral"]).cfg)
    tensors = single_experts(specs, 3, names, holder, np.random.default_rng(0))
    kept = {key: values for key, values in tensors.items() if left_out not in key}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(names)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(tmp_path, specs)
    assert "\n" not in str(caught.value)
