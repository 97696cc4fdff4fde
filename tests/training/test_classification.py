"""Sequence classification as a run: it learns, resumes, exports, and is refused where wrong."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlora
from jaxlora.config.load import load_config
from jaxlora.core.errors import UserError
from jaxlora.training.evaluation import evaluate
from jaxlora.training.labels import Confusion
from jaxlora.training.loop import train

NOUNS, NAMES = ("cat", "dog", "river"), ("animal", "other", "pet")
LABEL_OF = {"cat": "pet", "dog": "animal", "river": "other"}


def write_texts(path, count, seed=0, numbers=False):
    """The label follows from the noun, which stands anywhere among other words."""
    rng = random.Random(seed)
    words = "the red green blue big small house stone".split()
    with path.open("w") as file:
        for _ in range(count):
            noun = rng.choice(NOUNS)
            text = rng.choices(words, k=rng.randint(2, 7))
            text.insert(rng.randrange(len(text) + 1), noun)
            label = LABEL_OF[noun]
            row = {"text": " ".join(text), "label": NAMES.index(label) if numbers else label}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", 240)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, write_encoder):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def run(base, texts, tmp_path):
    def start(name="run", **changes):
        keys = {
            "base_model": str(base),
            "num_labels": 3,
            "datasets": [{"path": str(texts), "type": "classification"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "val_set_size": 40,
            "output_dir": str(tmp_path / name),
            "sequence_len": 32,
            "micro_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "evals_per_epoch": 0,
            **changes,
        }
        keys = {key: value for key, value in keys.items() if value is not None}
        return train(load_config(keys), quiet=True)

    return start


FULL = {"lr_scheduler": "constant"}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def test_a_decoder_learns_with_lora_and_evaluates_as_it_printed(run, texts):
    result = run(max_steps=60, **LORA)
    assert result.accuracy_before < 0.6
    assert result.accuracy > 0.95
    again = evaluate(
        load_config(result.output_dir / "config.yml", [f"--lora_model_dir={result.output_dir}"])
    )
    assert again.accuracy == result.accuracy
    assert again.loss == pytest.approx(result.eval_loss, rel=1e-5)  # weights went through a file
    card = (result.output_dir / "README.md").read_text()
    assert "num_labels=3, id2label={0: 'animal', 1: 'other', 2: 'pet'})" in card
    answers = jaxlora.classify(result.output_dir, ["the big cat", "small red river stone"])
    assert [answer.label for answer in answers] == ["pet", "other"]
    assert sum(answers[0].probabilities.values()) == pytest.approx(1)
    with pytest.raises(UserError, match=rf"{result.output_dir}: .* does not write text .*classify"):
        jaxlora.load(result.output_dir)


def test_the_confusion_has_a_row_for_each_label(base, texts, tmp_path):
    """Before training, when what is said is not what is there."""
    labels = ["pet", "pet", "pet", "animal"]
    rows = [{"text": f"the {i}", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "base_model": str(base),
        "num_labels": 3,
        "datasets": [{"path": str(texts), "type": "classification"}],
        "test_datasets": [{"path": str(tmp_path / "few.jsonl"), "type": "classification"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "run"),
        "sequence_len": 16,
        "micro_batch_size": 3,
        "learning_rate": 1e-3,
    }
    confusion = evaluate(load_config(keys)).held_out.confusion
    assert confusion.counts.sum(axis=1).tolist() == [1, 0, 3]  # animal, other, pet
    assert confusion.counts.sum(axis=0).tolist() != [1, 0, 3]
    assert confusion.majority == 0.75


def test_an_encoder_learns_every_weight_and_exports_a_classifier(run, encoder):
    result = run(**FULL, base_model=str(encoder), micro_batch_size=32, max_steps=60)
    assert result.accuracy > 0.95
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "animal", "1": "other", "2": "pet"}
    assert config["label2id"] == {"animal": 0, "other": 1, "pet": 2}
    assert config["problem_type"] == "single_label_classification"
    # num_labels may be left out where the base has a head.
    changes = [f"--base_model={result.output_dir}", "--num_labels=null"]
    again = evaluate(load_config(result.output_dir / "config.yml", changes))
    assert again.accuracy == result.accuracy
    assert jaxlora.classify(result.output_dir, "the dog house")[0].label == "animal"


def test_a_pooler_that_the_base_lacks_is_trained_and_saved(run, encoder):
    result = run(base_model=str(encoder), max_steps=2, **LORA)
    written = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_CLS"
    assert written["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert not any("pooler" in name for name in written["target_modules"])
    tensors = load_file(result.output_dir / "adapter_model.safetensors")
    assert tensors["base_model.model.bert.pooler.dense.weight"].shape == (32, 32)


@pytest.mark.parametrize("storage", ["nf4", "int4", "int8"])
def test_a_quantized_base_keeps_its_head_in_full(run, storage):
    method = {**LORA, "adapter": "lora" if storage == "int8" else "qlora"}
    result = run(max_steps=2, quantization=storage, **method)
    tensors = load_file(result.output_dir / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (3, 64)
    assert result.eval_loss != result.eval_loss_before
    assert jaxlora.classify(result.output_dir, "the cat")[0].label in NAMES


def test_a_stopped_run_continues_bit_for_bit(run, crash_at):
    whole = run("whole", **LORA)
    crash_at(3)
    with pytest.raises(RuntimeError, match="deliberate"):
        run("cut", save_strategy=None, save_steps=2, **LORA)
    crash_at(None)
    cut = run("cut", save_strategy=None, save_steps=2, resume_from_checkpoint=True, **LORA)
    tensors = [load_file(each.output_dir / "adapter_model.safetensors") for each in (whole, cut)]
    for name, tensor in tensors[0].items():
        np.testing.assert_array_equal(tensor, tensors[1][name], err_msg=name)
    assert cut.accuracy == whole.accuracy
    # An export of a checkpoint knows the names too, without the data.
    checkpoint = cut.output_dir / "checkpoints" / "checkpoint-2"
    jaxlora.export(checkpoint, cut.output_dir.parent / "early")
    answer = jaxlora.classify(cut.output_dir.parent / "early", "the cat")[0]
    assert set(answer.probabilities) == set(NAMES)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(run, metrics_of, accumulation):
    whole = metrics_of(run("whole", max_steps=2).output_dir)
    cut = run(
        "cut",
        max_steps=2,
        micro_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    for one, other in zip(whole, metrics_of(cut.output_dir), strict=True):
        if "loss" in one:
            assert one["trained_tokens"] == other["trained_tokens"] == 8  # texts
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)  # another order of sums
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


PAD = {"special_tokens": {"pad_token": "<fill>"}}


@pytest.mark.parametrize("method", [{}, {**LORA, "lora_modules_to_save": ["embed_tokens"]}])
def test_a_classifier_learns_new_tokens_and_is_padded_with_its_own(run, tmp_path, method):
    """The base names another padding token, by which transformers would miss the last token."""
    result = run(max_steps=2, tokens=[" river"], **PAD, **method)
    folder, card = result.output_dir, (result.output_dir / "README.md").read_text()
    answers = jaxlora.classify(folder, ["the cat", "small red river stone"])
    if method:
        rows = load_file(folder / "adapter_model.safetensors")[
            "base_model.model.model.embed_tokens.weight"
        ].shape[0]
        pad = rows - 2
        assert f"model.resize_token_embeddings({rows}, mean_resizing=False)\n" in card
        assert f"model.config.pad_token_id = {pad}\n" in card
        folder = jaxlora.merge(folder, None, tmp_path / "merged", dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == config["vocab_size"] - 2  # as <fill> comes first
    again = jaxlora.classify(folder, ["the cat", "small red river stone"])
    for one, other in zip(answers, again, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-5)


def test_an_adapter_continues_where_it_was(run):
    first = run("first", **LORA)
    again = run("again", lora_model_dir=str(first.output_dir), max_steps=1, **LORA)
    assert again.eval_loss_before == pytest.approx(first.eval_loss, rel=1e-5)
    assert again.accuracy_before == first.accuracy
    with pytest.raises(UserError, match=r"lora_model_dir: .* has 3 labels and the run 4"):
        run("other", lora_model_dir=str(first.output_dir), num_labels=4, **LORA)


def test_unfrozen_parameters_leave_the_rest_of_the_body_as_it_was(run, base):
    result = run(unfrozen_parameters=["model.layers.1."], max_steps=2)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base, result.output_dir)
    )
    same = {name for name in after if name in before and np.array_equal(after[name], before[name])}
    assert set(after) - set(before) == {"score.weight"}
    assert set(before) - set(after) == {"lm_head.weight"}
    assert {name for name in after if "layers.1." in name}.isdisjoint(same)
    assert {name for name in after if "layers.0." in name or "embed" in name} <= same


def test_two_texts_have_types_of_their_own(run, encoder, tmp_path):
    """The label says whether the second text names the noun of the first."""
    rng, path = random.Random(0), tmp_path / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(60):
            one, two = rng.choice(NOUNS), rng.choice(NOUNS)
            row = {"a": f"the {one}", "b": f"big {two} in", "same": int(one == two)}
            file.write(json.dumps(row) + "\n")
    pairs = {"field": "a", "field_pair": "b", "field_label": "same"}
    data = [{"path": str(path), "type": "classification", **pairs}]
    options = {"base_model": str(encoder), "num_labels": 2, "datasets": data, "max_steps": 2}
    result = run(**options)
    folder = result.output_dir
    answers = jaxlora.classify(folder, [("the cat", "big cat in"), ("the cat", "big dog in")])
    assert [sorted(answer.probabilities) for answer in answers] == [["LABEL_0", "LABEL_1"]] * 2
    swapped = jaxlora.classify(folder, [("big cat in", "the cat")])
    assert swapped[0].probabilities != answers[0].probabilities


def labelled_rows(tmp_path, *labels):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "the cat"} | ({} if label is None else {"label": label}) for label in labels]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"datasets": [{"path": str(path), "type": "classification"}], "val_set_size": 0}


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ((0, 1, 3), {}, r"rows.jsonl:3: the label in \"label\" is 3; expected 0 to 2"),
        ((0, 1, -1), {}, r"rows.jsonl:3: the label in \"label\" is -1; expected 0 to 2"),
        ((0, None), {}, r"rows.jsonl:2: the type classification needs the column \"label\""),
        ((0, "pet"), {}, r"rows.jsonl:2: the label .* is 'pet'; expected 0 to 2"),
        ((0, True), {}, r"rows.jsonl:2: the label .* is True"),
        ((0, 1.0), {}, r"rows.jsonl:2: the label .* is 1.0"),
        (("a", 7), {}, r"rows.jsonl:2: the label .* is 7, and rows before it have names \(a\)"),
        (("a", "b"), {}, r"num_labels: 3, but the training data has 2 \(a, b\).* or list all 3"),
        (tuple("abcd"), {}, r"num_labels: 3, but .* has 4 \(a, b, c, d\); set num_labels: 4\.$"),
        (
            ("a", "b", "petz"),
            {"label_names": ["a", "b", "pet"]},
            r"rows.jsonl:3: the label .* is 'petz'; expected a, b, pet or 0 to 2 .*mean .pet",
        ),
        (
            ("a", "b"),
            {"label_names": ["a", "b"]},
            "num_labels: 3, but label_names lists 2",
        ),
        (("a", "b"), {"num_labels": None}, "num_labels: .* has no head of labels; set it"),
        ((0, 1), {"sample_packing": True}, "sample_packing: a classifier reads one text"),
        ((0, 1), {"objective": "clm"}, "objective: clm does not fit .*classification"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, labels, changes, message):
    with pytest.raises(UserError, match=message) as error:
        run(**{**labelled_rows(tmp_path, *labels), **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_head_of_another_size_is_refused(run, tmp_path, write_base):
    folder = write_base(tmp_path / "classifier")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"num_labels: 3, but .* is a classifier of 2 labels"):
        run(base_model=str(folder))
    # The folder says that there is a head, so there must be one.
    with pytest.raises(UserError, match=r"config.json asks for score.weight"):
        run(base_model=str(folder), num_labels=None)


def test_only_data_with_labels_fits(run, texts):
    plain = [{"path": str(texts), "type": "completion"}]
    with pytest.raises(UserError, match="num_labels: a classifier learns from data of type"):
        run(datasets=plain)
    with pytest.raises(UserError, match=r"test_datasets\[0\].type: it does not go with"):
        run(test_datasets=plain, val_set_size=None)


def test_the_table_of_many_labels_counts_the_rarer_ones_together():
    counts = np.diag(np.arange(33.0, 0.0, -1.0))
    counts[32, 0] = 2  # of the rarest label, taken for the first
    lines = Confusion(counts, tuple(f"l{i}" for i in range(33))).table().split("\n")
    assert len(lines) == 31
    assert lines[0] == "  l0: 33 of 33"
    assert lines[-1] == "  3 rarer labels: 6 of 8"
