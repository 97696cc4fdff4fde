"""A base that somebody else quantized is trained, exported, merged and asked like any other."""

import json

import foreign
import jax
import numpy as np
import pytest

import jaxlora
from jaxlora import lora
from jaxlora.checkpoints.load import load_params, read_model_config
from jaxlora.checkpoints.peft import load_adapter
from jaxlora.core.errors import UserError
from jaxlora.core.tree import flatten
from jaxlora.generation.probe import probe_logits
from jaxlora.models.parameters import describe


@pytest.fixture(scope="module")
def bases(tmp_path_factory, write_base):
    """``bases(method) -> (quantized folder, its plain twin)``, shared."""
    made = {}

    def get(method):
        if method not in made:
            made[method] = foreign.write(tmp_path_factory.mktemp(method), method, write_base)
        return made[method]

    return get


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


SLOW = [pytest.param(name, marks=pytest.mark.oracle) for name in ("int8", "awq", "compressed")]


@pytest.mark.parametrize("method", ["nf4", "gptq", *SLOW])
def test_a_run_learns_as_on_the_plain_twin_and_its_results_work(method, bases, run, tmp_path):
    quantized, twin = bases(method)
    wish = {"load_in_8bit": True} if method == "int8" else {"load_in_4bit": True}
    run("ours", base_model=str(quantized), **wish)
    run("plain", base_model=str(twin))
    ours, expected = losses(tmp_path / "ours"), losses(tmp_path / "plain")
    assert ours[-1] < ours[0] - 0.1
    # Six steps of AdamW in float32 on the same numbers, summed in another order.
    np.testing.assert_allclose(ours, expected, atol=2e-3)

    answers = jaxlora.generate(tmp_path / "ours", ["one"], max_new_tokens=4)
    assert len(answers) == 1
    jaxlora.export(tmp_path / "ours", tmp_path / "exported")
    merged = jaxlora.merge(tmp_path / "exported", None, tmp_path / "merged", dtype="float32")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    cfg, _ = read_model_config(quantized)
    params = load_params(quantized, cfg, dtype="float32")
    adapter, targets, _ = load_adapter(tmp_path / "exported", describe(cfg))
    sum_of = load_params(merged, read_model_config(merged)[0], dtype="float32")
    assert all(isinstance(leaf, jax.Array) for leaf in flatten(sum_of).values())
    difference = probe_logits(cfg, lora.apply(params, adapter, targets)) - probe_logits(cfg, sum_of)
    assert np.abs(difference).max() < 2e-5  # float32, the low-rank product summed first or last
    rows = dict(jaxlora.inspect(quantized))
    assert rows["quantized"].split()[0].lower() in ("bitsandbytes", "gptq", "awq") or (
        rows["quantized"].startswith("compressed-tensors")
    )


def test_a_classifier_learns_as_on_the_plain_twin(bases, run, tmp_path):
    quantized, twin = bases("nf4")
    rows = [{"text": f"the {word} house", "label": word} for word in ("red", "blue")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    data = [{"path": str(tmp_path / "texts.jsonl"), "type": "classification"}]
    options = {"datasets": data, "num_labels": 2}
    run("ours", base_model=str(quantized), **options)
    run("plain", base_model=str(twin), **options)
    ours, expected = losses(tmp_path / "ours"), losses(tmp_path / "plain")
    assert ours[-1] < ours[0] - 0.1
    np.testing.assert_allclose(ours, expected, atol=2e-3)  # as above
    merged = jaxlora.merge(tmp_path / "ours", None, tmp_path / "merged", dtype="float32")
    one, two = (jaxlora.classify(each, "the red house")[0] for each in (tmp_path / "ours", merged))
    assert one.label == two.label == "red"
    assert one.probabilities == pytest.approx(two.probabilities, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "wishes", "message"),
    [
        ("nf4", {"adapter": None, "lora_r": None}, r"adapter: .*cannot be trained itself"),
        ("nf4", {"load_in_8bit": True}, r"load_in_8bit: 8-bit contradicts .*bitsandbytes nf4"),
        ("int8", {"load_in_4bit": True}, r"load_in_4bit: 4-bit contradicts .*bitsandbytes int8"),
        ("gptq", {"peft_init_lora_weights": "pissa"}, r"peft_init_lora_weights: pissa takes"),
        ("gptq", {"quantization": "nf4"}, r"quantization: nf4 contradicts .*GPTQ 4-bit"),
        (
            "gptq",
            {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}},
            "bnb_4bit_quant_type: nf4 contradicts",
        ),
    ],
)
def test_a_key_that_contradicts_the_files_is_named(method, wishes, message, bases, run):
    full = dict.fromkeys(("lora_alpha", "lora_target_linear"))
    changes = {**(full if wishes.get("adapter", "") is None else {}), **wishes}
    with pytest.raises(UserError, match=message) as caught:
        run(base_model=str(bases(method)[0]), **changes)
    assert "\n" not in str(caught.value)


def test_verify_refuses_what_peft_cannot_compute_in_one_line(bases, run, tmp_path):
    run("ours", base_model=str(bases("gptq")[0]))
    with pytest.raises(UserError, match=r"is quantized .*GPTQ") as caught:
        jaxlora.verify(tmp_path / "ours")
    assert "\n" not in str(caught.value)
