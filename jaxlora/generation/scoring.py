"""How often the greedy answer is exactly the expected text."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxlora.generation.decoding import Params, generate
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.text import answer_text, end_ids
from jaxlora.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Sample:
    """One scored answer."""

    prompt: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the texts are equal but for white space around them."""
        return self.answer.strip() == self.expected.strip()


@dataclasses.dataclass(frozen=True)
class Score:
    """The result of `exact_match`; `samples` are in the order of the examples."""

    correct: int
    total: int
    samples: tuple[Sample, ...]

    @property
    def rate(self) -> float:
        """Fraction in [0, 1] of exact answers; 0 of none is 0.

        >>> Score(3, 4, ()).rate
        0.75
        """
        return self.correct / self.total if self.total else 0.0


def exact_match(
    transformer: Transformer,
    params: Params,
    examples: Sequence[tuple[Sequence[int], str]],
    tokenizer: Any,
    options: SamplingOptions,
    *,
    eos_ids: Collection[int] | None = None,
    batch_size: int = 8,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Generates an answer to each prompt and counts those equal to the expected text.

    White space around answer and expected text does not count; a special token in an answer does.

    Args:
      transformer, params, options, batch_size, between: as for `generate`.
      examples: prompt token ids with the expected text, less its end token.
      tokenizer: of transformers.
      eos_ids: what ends an answer; None: the tokenizer's end token.

    Raises:
      UserError: as `generate`.
    """
    ends = end_ids(tokenizer) if eos_ids is None else eos_ids
    prompts = [list(prompt) for prompt, _ in examples]
    answers = generate(
        transformer, params, prompts, options, ends, batch_size=batch_size, between=between
    )
    samples = tuple(
        Sample(
            answer_text(tokenizer, (), prompt, special=True),
            expected,
            answer_text(tokenizer, prompt, answer, special=True),
        )
        for prompt, answer, (_, expected) in zip(prompts, answers, examples, strict=True)
    )
    return Score(sum(sample.correct for sample in samples), len(samples), samples)
