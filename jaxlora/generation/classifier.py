"""A classifier ready to name the labels of texts."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlora.checkpoints.label_head import default_names, names_in_config
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree
from jaxlora.data.tokenizer import Encoder, pad_id
from jaxlora.generation.model import open_model
from jaxlora.models.task import LABEL, task_of
from jaxlora.models.transformer import Transformer, bind

_ROUND_TO = 32


@dataclasses.dataclass(frozen=True)
class Classification:
    """What a classifier says to one text: the most likely label, and how likely each is."""

    label: str
    probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Base weights with an adapter on top; made by `load_classifier`."""

    transformer: Transformer
    params: Tree
    tokenizer: Any
    labels: tuple[str, ...]

    def classify(
        self, texts: Sequence[str | tuple[str, str]], *, batch_size: int = 8
    ) -> list[Classification]:
        """Returns the label of each text, or of each pair of texts.

        A text longer than the model's context is cut off there.
        """
        encoder, limit = Encoder(self.tokenizer), self.transformer.cfg.max_context
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        encodings = encoder.whole(pairs, limit)
        for text, encoding in zip(texts, encodings, strict=True):
            if not encoding.ids:
                raise UserError(f"classify: {text!r} has no token; expected a text.")
        answers: list[Classification] = []
        for start in range(0, len(encodings), batch_size):
            answers += self._batch(encodings[start : start + batch_size])
        return answers

    def _batch(self, encodings: Sequence[Any]) -> list[Classification]:
        longest = max(len(encoding.ids) for encoding in encodings)
        length = -(-longest // _ROUND_TO) * _ROUND_TO
        tokens = np.full((len(encodings), length), pad_id(self.tokenizer), np.int32)
        types, segments = np.zeros_like(tokens), np.zeros_like(tokens)
        for row, encoding in enumerate(encodings):
            count = len(encoding.ids)
            tokens[row, :count], segments[row, :count] = encoding.ids, 1
            if "token_type_ids" in self.tokenizer.model_input_names:
                types[row, :count] = encoding.type_ids
        given = types if self.transformer.cfg.token_types > 1 else None
        logits = _logits(self.transformer, self.params, tokens, segments, given)
        shares = np.asarray(jax.nn.softmax(logits, axis=-1))
        return [
            Classification(
                self.labels[int(row.argmax())],
                {name: float(share) for name, share in zip(self.labels, row, strict=True)},
            )
            for row in shares
        ]


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    transformer: Transformer, params: Tree, tokens: Any, segments: Any, types: Any
) -> Float[Array, "B N"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) * segments
    model = bind(transformer, params)
    hidden, _ = model(tokens, positions, segments, types=types)
    return model.logits(model.pooled(hidden, segments))


def load_classifier(
    model: str | Path, adapter: str | Path | None = None, **options: Any
) -> Classifier:
    """Loads a model to classify with.

    Args:
      model, adapter, options: as for `jaxlora.load`.

    Raises:
      UserError: anything missing, damaged or unfitting, or no head of labels.
    """
    opened = open_model(model, adapter, **options)
    if task_of(opened.cfg) != LABEL:
        raise UserError(
            f"{opened.folder}: {opened.cfg.family} has no head of labels; expected a classifier, "
            "or an adapter that was trained with num_labels."
        )
    names = opened.labels or names_in_config(opened.raw) or default_names(opened.cfg.num_labels)
    transformer = Transformer(opened.cfg, dtype=opened.dtype)
    return Classifier(transformer, opened.load(), opened.tokenizer, names)
