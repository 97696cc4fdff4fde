"""Classifiers made of models of tokens: losses, gradients, adapters and folders against
transformers and PEFT."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from pairs import scale_weights

import jaxlora
from jaxlora.checkpoints.save import saved_tensors
from jaxlora.core.errors import UserError
from jaxlora.data.batches import Batches
from jaxlora.data.table import TokenTable
from jaxlora.data.tokenizer import load_tokenizer
from jaxlora.generation.classifier import load_classifier
from jaxlora.generation.probe import probe_tokens
from jaxlora.models.families import CLASSIFIERS
from jaxlora.models.families.labelled import labelled
from jaxlora.models.families.read import read_config
from jaxlora.models.transformer import Transformer
from jaxlora.training.step import batch_loss

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.oracle

LABELS = 3
# float32 on both sides; a few layers of another order of summation.
TOLERANCE = 2e-5
WORDS = "the cat dog house river stone is was in on red green blue big small and".split()
TEXTS = ["the cat", "dog in the house and the river was big", "stone", "red red green on"]
PAIRS = [("the cat", "is big"), ("river", "was the dog in the house"), ("red", "blue")]
NAMES = {name: case for name, case in CASES.items() if case.family in CLASSIFIERS}
# One of each kind: a plain decoder, fused and Conv1D projections, tied and untied, each encoder.
EXPORTED = ("llama 3.1", "phi-3", "gpt-2", "bert", "bert, untied, relu", "roberta", "modernbert")


@pytest.mark.parametrize("name", NAMES)
def test_a_base_becomes_the_classifier_that_its_config_describes(name):
    import transformers

    case = NAMES[name]
    raw = getattr(transformers, case.config)(**case.fields).to_dict()
    base = {**raw, "architectures": [case.family]}
    named = {**raw, "architectures": [CLASSIFIERS[case.family]], "id2label": dict.fromkeys("0123")}
    made = labelled(read_config(base), 4)
    if made.renamed != read_config(named).renamed:  # of the head that is gone
        made = dataclasses.replace(made, renamed=())
    assert made == read_config(named)


@pytest.mark.parametrize("family", sorted({case.family for case in NAMES.values()}))
def test_transformers_has_every_classifier(family):
    import transformers

    assert hasattr(transformers, CLASSIFIERS[family])


def make_tokenizer(types):
    """BERT's, or another that does the same and tells the model of no types."""
    import transformers

    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # RoBERTa's padding is 1
    made = transformers.BertTokenizer({word: i for i, word in enumerate([*special, *WORDS])})
    if types:
        return made
    names = {f"{text.strip('[]').lower()}_token": text for text in special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, **names)


@dataclasses.dataclass
class Base:
    """A model of tokens on disk, and what goes with it."""

    folder: Any
    tokenizer: Any

    def inputs(self, texts):
        pairs = [(text, None) if isinstance(text, str) else text for text in texts]
        first, second = zip(*pairs, strict=True)
        second = None if second[0] is None else list(second)
        return self.tokenizer(list(first), second, padding=True, return_tensors="pt")


@pytest.fixture
def make_base(tmp_path):
    def make(name):
        import transformers

        case, folder = CASES[name], tmp_path / "base"
        fields = {"num_hidden_layers": 2, **case.fields, "pad_token_id": 1}
        torch.manual_seed(0)
        model = getattr(transformers, case.family)(getattr(transformers, case.config)(**fields))
        scale_weights(model, 0)
        model.save_pretrained(folder)
        tokenizer = make_tokenizer(types=case.family.startswith("Bert"))
        tokenizer.save_pretrained(folder)
        return Base(folder, tokenizer)

    return make


def train(base, tmp_path, **changes):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": text, "label": "abc"[i % LABELS]} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "base_model": str(base.folder),
        "num_labels": LABELS,
        "datasets": [{"path": str(path), "type": "classification"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "run"),
        "sequence_len": 32,
        "micro_batch_size": 4,
        "learning_rate": 3e-2,  # a few steps must leave a mark
        "lr_scheduler": "constant",
        "max_steps": 3,
        **changes,
    }
    return jaxlora.train({k: v for k, v in keys.items() if v is not None}, quiet=True).output_dir


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def our_logits(classifier, texts):
    """Up to a constant a text, as probabilities tell."""
    shares = [list(each.probabilities.values()) for each in classifier.classify(texts)]
    return np.log(np.array(shares, np.float64))


def their_logits(model, inputs):
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def load_base_in_transformers(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=LABELS, pad_token_id=1, attn_implementation="eager"
    )


@pytest.mark.parametrize("name", EXPORTED)
def test_peft_loads_an_adapter_with_equal_logits(make_base, tmp_path, name):
    base = make_base(name)
    folder = train(base, tmp_path, **LORA)
    model = load_base_in_transformers(base.folder)
    before = their_logits(model, base.inputs(TEXTS))
    model = peft.PeftModel.from_pretrained(model, folder)
    wanted = their_logits(model, base.inputs(TEXTS))
    assert np.abs(wanted - before).max() > 0.1
    got = our_logits(load_classifier(folder), TEXTS)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE)
    verdict = jaxlora.verify(folder)
    assert verdict.ok, verdict
    merged = jaxlora.merge(folder, None, tmp_path / "merged")
    check_folder(merged, base, wanted)


def check_folder(folder, base, wanted):
    """`folder` holds a classifier that transformers loads, with these logits."""
    from transformers import AutoModelForSequenceClassification, pipeline

    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    if wanted is None:
        wanted = our_logits(load_classifier(folder), TEXTS)
    np.testing.assert_allclose(their_logits(model, base.inputs(TEXTS)), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(our_logits(load_classifier(folder), TEXTS), wanted, atol=TOLERANCE)
    classify = pipeline("text-classification", model=str(folder), batch_size=3)
    answers = [answer["label"] for answer in classify(TEXTS)]
    assert answers == ["abc"[i] for i in wanted.argmax(axis=-1)]


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_loads_a_full_fine_tune_with_equal_logits(make_base, tmp_path, name):
    base = make_base(name)
    check_folder(train(base, tmp_path), base, None)


@pytest.mark.parametrize("method", [{}, {**LORA, "lora_modules_to_save": ["embed_tokens"]}])
def test_a_batch_filled_up_with_a_new_token_has_equal_logits(make_base, tmp_path, method):
    """transformers finds the last token of a text by the padding token of config.json."""
    base = make_base("llama 3.1")
    new = {"tokens": ["riv"], "special_tokens": {"pad_token": "<fill>"}}
    folder = train(base, tmp_path, **new, **method)
    if method:
        folder = jaxlora.merge(folder, None, tmp_path / "merged", dtype="float32")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "<fill>"
    check_folder(folder, Base(folder, tokenizer), None)


@pytest.mark.parametrize("padded", [False, True])
def test_verify_reads_every_token_whatever_the_padding(make_base, tmp_path, padded):
    base = make_base("llama 3.1")
    folder = train(base, tmp_path, **LORA)
    config = json.loads((base.folder / "config.json").read_text())
    last = int(probe_tokens(read_config(config))[1, -1])  # of what verify asks about
    config["pad_token_id"] = last if padded else None
    (base.folder / "config.json").write_text(json.dumps(config))
    assert jaxlora.verify(folder).ok


def test_pairs_have_the_types_of_transformers(make_base, tmp_path):
    base = make_base("bert")
    folder = train(base, tmp_path, **LORA)
    model = peft.PeftModel.from_pretrained(load_base_in_transformers(base.folder), folder)
    inputs = base.inputs(PAIRS)
    assert inputs["token_type_ids"].any()
    got = our_logits(load_classifier(folder), PAIRS)
    np.testing.assert_allclose(got, their_logits(model, inputs), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama 3.1", "roberta", "modernbert"])
def test_an_adapter_of_peft_has_equal_logits_here(make_base, tmp_path, name):
    base = make_base(name)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(load_base_in_transformers(base.folder), config)
    scale_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    got = our_logits(load_classifier(base.folder, tmp_path / "adapter"), TEXTS)
    np.testing.assert_allclose(got, their_logits(model, base.inputs(TEXTS)), atol=TOLERANCE)


def scale_adapter(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_an_adapter_without_the_pooler_of_a_base_without_one_is_refused(make_base, tmp_path):
    base = make_base("bert")
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(load_base_in_transformers(base.folder), config).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match=r"holds no bert.pooler.dense.bias, a part of the head"):
        load_classifier(base.folder, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["llama 3.1", "gpt-2", "bert", "modernbert"])
def test_loss_and_gradients_equal_transformers(make_base, tmp_path, name):
    base = make_base(name)
    folder = train(base, tmp_path, learning_rate=1e-2)
    model = load_base_in_transformers(folder)
    classifier = load_classifier(folder)
    labels = [2, 0, 1, 1]
    pairs = not CASES[name].family.startswith("Bert")
    inputs = base.inputs(TEXTS if pairs else [(text, "the river") for text in TEXTS])
    loss = model(**inputs, labels=torch.tensor(labels)).loss
    loss.backward()
    wanted = {
        name: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    ids = [row[:length] for row, length in zip(inputs["input_ids"].numpy(), lengths, strict=True)]
    types = inputs.get("token_type_ids")
    starts = lengths if types is None else [int(np.argmax(row)) for row in types.numpy()]
    table = dataclasses.replace(
        TokenTable.of([(row, np.zeros(len(row))) for row in ids]),
        labels=np.stack([labels, starts], axis=1).astype(np.int32),
    )
    # In two micro-batches, of which each contributes its sum.
    batches = Batches(
        table,
        sequence_len=32,
        rows=2,
        accumulation=2,
        pad_id=1,
        token_types=types is not None,
        shuffle=False,
    )
    cfg = classifier.transformer.cfg
    batch = {name: jnp.asarray(array) for name, array in batches.batch(0).items()}

    @jax.jit
    def mean_loss(params):
        def of(number):
            part = {name: array[number] for name, array in batch.items()}
            return batch_loss(Transformer(cfg), params, part)

        return (of(0) + of(1)) / jnp.sum(batch["weights"])

    value, gradient = jax.value_and_grad(mean_loss)(classifier.params)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    tensors = saved_tensors(gradient, cfg)
    largest = max(np.abs(each).max() for each in wanted.values())
    assert set(tensors) <= set(wanted)
    for name, tensor in tensors.items():
        difference = np.abs(tensor.values(jnp.float32) - wanted[name]).max()
        assert difference <= 1e-4 * max(np.abs(wanted[name]).max(), 1e-2 * largest), name
