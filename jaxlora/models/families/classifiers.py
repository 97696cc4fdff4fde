"""Sequence classification: the rows of other families with a head of labels."""

import re
from collections.abc import Mapping
from typing import Any

from jaxlora.models.families.encoders import BERT, MODERNBERT, ROBERTA
from jaxlora.models.families.row import Family, Fields, Names, head_tensor_of

_HEAD = re.compile(r"(ForCausalLM|LMHeadModel)$")


def _num_labels(fields: Fields) -> int:
    """transformers writes the labels' names, and nothing where there are two without a name."""
    return len(fields["id2label"] or ()) or fields["num_labels"] or 2


def _classifier(row: Family, names: Names, **config: Any) -> Family:
    """`row` with a head of labels; the head it had is left out where a file holds it."""
    head = head_tensor_of(row).removesuffix(".weight")
    return row.but(
        fields={"id2label": None, "num_labels": None},
        config={"num_labels": _num_labels, **config},
        names=names,
        buffers=(*row.buffers, f"{head}.weight", f"{head}.bias"),
    )


def _score(row: Family) -> Family:
    """A decoder: what it knows after its last token."""
    return _classifier(row, {"classifier": "score"}, pooling="last", head_bias=False)


_SCORED = """Llama Mistral Mixtral Qwen2 Qwen2Moe Qwen3 Qwen3Moe SmolLM3 Olmo2 Olmo3 SeedOss Phi3
    Glm Glm4 Gemma Gemma2 Phi StableLm Starcoder2 GPTNeoX GPT2 Falcon DeepseekV2 DeepseekV3
    GptOss""".split()


def rows(decoders: Mapping[str, Family]) -> dict[str, Family]:
    """Returns the classifiers that transformers has, made from the decoders and the encoders."""
    by_name = {_HEAD.sub("", name): row for name, row in decoders.items()}
    scored = {f"{name}ForSequenceClassification": _score(by_name[name]) for name in _SCORED}
    return {
        **scored,
        "Gemma3TextForSequenceClassification": _score(by_name["Gemma3"]),
        **ENCODERS,
    }


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


def _modernbert_pooling(fields: Fields) -> str:
    return {"cls": "first", "mean": "mean"}[fields["classifier_pooling"]]


_MODERNBERT = _classifier(
    MODERNBERT.but(fields={"classifier_pooling": "cls"}),
    {"classifier": "classifier"},
    pooling=_modernbert_pooling,
    head_bias=True,
)

ENCODERS: dict[str, Family] = {
    "BertForSequenceClassification": _BERT,
    "RobertaForSequenceClassification": _ROBERTA,
    "ModernBertForSequenceClassification": _MODERNBERT,
}
