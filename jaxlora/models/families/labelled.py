"""A model of tokens as the classifier that is fine-tuned from it."""

import dataclasses

from jaxlora.core.errors import UserError
from jaxlora.models.config import ModelConfig
from jaxlora.models.families import CLASSIFIERS, FAMILIES


def labelled(cfg: ModelConfig, num_labels: int) -> ModelConfig:
    """Returns the shape of the same body with a head of labels.

    Raises:
      UserError: transformers has no classifier of this architecture, so nothing could load it.

    >>> cfg = labelled(ModelConfig(8, 4, 8, 2, 2, 1, 2, 16, 1e-5), 3)
    >>> cfg.family, cfg.num_labels
    ('LlamaForSequenceClassification', 3)
    """
    if cfg.family not in CLASSIFIERS:
        raise UserError(
            f"num_labels: transformers has no classifier of {cfg.family}; those with one: "
            f"{', '.join(sorted(CLASSIFIERS))}."
        )
    name = CLASSIFIERS[cfg.family]
    base = FAMILIES[cfg.family].config
    own = {
        field: value
        for field, value in FAMILIES[name].config.items()
        if value is not base.get(field) and field != "num_labels"
    }
    assert not any(map(callable, own.values())), own
    return dataclasses.replace(cfg, family=name, num_labels=num_labels, **own)
