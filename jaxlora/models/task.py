"""What a model is for, in the words of the libraries that will load it."""

import dataclasses

from jaxlora.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Task:
    """One use of a transformer.

    Attributes:
      peft: PEFT's task type; masked-language modelling has none there.
      auto_class: the class of transformers that loads such a model.
      pipeline: the hub's word for what it does.
      objective: what it learns, in the words of the key `objective`.
    """

    peft: str | None
    auto_class: str
    pipeline: str
    objective: str


NEXT_TOKEN = Task("CAUSAL_LM", "AutoModelForCausalLM", "text-generation", "clm")
MASKED_TOKEN = Task(None, "AutoModelForMaskedLM", "fill-mask", "mlm")
LABEL = Task(
    "SEQ_CLS", "AutoModelForSequenceClassification", "text-classification", "classification"
)


def task_of(cfg: ModelConfig) -> Task:
    """Returns what the model's head is for."""
    if cfg.num_labels:
        return LABEL
    return NEXT_TOKEN if cfg.causal else MASKED_TOKEN
