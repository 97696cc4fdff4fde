"""Sequence classification: the rows of other families with a head of labels."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora.models.families.encoders import BERT, MODERNBERT, ROBERTA
from jaxlora.models.families.row import Family, Fields, Names, head_tensor_of

_HEAD = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM)$")
_CLASSIFIER = re.compile(r"ForSequenceClassification$")
_TRANSFORM = ("head_transform/dense", "head_transform/norm")


def _num_labels(fields: Fields) -> int:
    """transformers writes the labels' names, and nothing where there are two without a name."""
    return len(fields["id2label"] or ()) or fields["num_labels"] or 2


def _classifier(row: Family, names: Names, **config: Any) -> Family:
    """`row` with a head of labels; what it had in its place is left out where a file holds it."""
    replaced = [head_tensor_of(row).removesuffix(".weight")]
    if names.keys() & set(_TRANSFORM):  # another transform, which has no norm
        replaced += [str(row.names[name]) for name in _TRANSFORM]
    leaves = ("weight", "bias", *(older.rpartition(".")[2] for _, older in row.older))
    return row.but(
        fields={"id2label": None, "num_labels": None},
        config={"num_labels": _num_labels, **config},
        names=names,
        buffers=(*row.buffers, *(f"{name}.{leaf}" for name in replaced for leaf in leaves)),
    )


def _score(row: Family) -> Family:
    """A decoder: what it knows after its last token."""
    return _classifier(row, {"classifier": "score"}, pooling="last", head_bias=False)


_SCORED = """Llama Mistral Mixtral Qwen2 Qwen2Moe Qwen3 Qwen3Moe SmolLM3 Olmo2 Olmo3 SeedOss Phi3
    Glm Glm4 Gemma Gemma2 Phi StableLm Starcoder2 GPTNeoX GPT2 Falcon DeepseekV2 DeepseekV3
    GptOss Gemma3 Arcee Helium""".split()
_OTHER_STEMS = {"Gemma3": "Gemma3Text"}


def rows(decoders: Mapping[str, Family]) -> dict[str, Family]:
    """Returns the classifiers that transformers has, made from the decoders and the encoders."""
    scored = {name: _score(decoders[base]) for base, name in names(decoders).items()}
    return {**scored, **ENCODERS}


def names(bases: Iterable[str]) -> dict[str, str]:
    """Returns ``{architecture: that of its classifier}`` of those that have one."""
    by_stem = {_HEAD.sub("", base): base for base in bases}
    encoders = {_CLASSIFIER.sub("", name): name for name in ENCODERS}
    made = {stem: f"{_OTHER_STEMS.get(stem, stem)}ForSequenceClassification" for stem in _SCORED}
    return {by_stem[stem]: name for stem, name in {**made, **encoders}.items() if stem in by_stem}


_TANH = {"head_activation": "tanh", "head_norm": False, "head_bias": True, "pooling": "first"}

_BERT = _classifier(
    BERT,
    {"head_transform/dense": "bert.pooler.dense", "classifier": "classifier"},
    **_TANH,
    renamed=(),
)
_ROBERTA = _classifier(
    ROBERTA,
    {"head_transform/dense": "classifier.dense", "classifier": "classifier.out_proj"},
    **_TANH,
    renamed=(),
)


_MODERNBERT = _classifier(MODERNBERT, {"classifier": "classifier"}, head_bias=True)

ENCODERS: dict[str, Family] = {
    "BertForSequenceClassification": _BERT,
    "RobertaForSequenceClassification": _ROBERTA,
    "ModernBertForSequenceClassification": _MODERNBERT,
}
