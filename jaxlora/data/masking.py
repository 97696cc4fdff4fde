"""Masked-language modelling: which tokens of a batch are hidden, and as what."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlora.core.errors import UserError

# Of the chosen tokens: hidden behind the mask token, replaced by any token; the rest stay.
HIDDEN, REPLACED = 0.8, 0.1
_STREAM = 0x6D61736B  # apart from the stream that shuffles


@dataclasses.dataclass(frozen=True)
class Masking:
    """The 80/10/10 rule of BERT (Devlin et al. 2018), as transformers' collator applies it.

    Attributes:
      probability: share of the tokens that are chosen, special ones never.
      mask_id: the mask token.
      special_ids: tokens that are never chosen.
      num_tokens: ids below this may replace a token.
      seed: of the choice.
    """

    probability: float
    mask_id: int
    special_ids: tuple[int, ...]
    num_tokens: int
    seed: int

    @classmethod
    def of(cls, tokenizer: Any, *, probability: float, seed: int) -> "Masking":
        """Reads the ids from a tokenizer.

        Raises:
          UserError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise UserError(
                "objective: mlm needs a tokenizer with a mask token, which this one lacks; set "
                "tokenizer_config to the encoder's own."
            )
        special = tuple(sorted(map(int, tokenizer.all_special_ids)))
        return cls(probability, int(tokenizer.mask_token_id), special, len(tokenizer), seed)

    def __call__(self, batch: dict[str, NDArray], step: int) -> dict[str, NDArray]:
        """Returns batch `step` with tokens hidden, and what they were as targets.

        The draw runs over all rows of the batch in order, so that it depends neither on how they
        are cut into micro-batches nor on who computes which.

        Args:
          batch: from `Batches`; ``[accumulation, rows, T]``.
          step: number of the batch.
        """
        tokens = batch["tokens"]
        choice, use, other = np.random.default_rng([self.seed, _STREAM, step]).random(
            (3, *tokens.shape)
        )
        ordinary = (batch["segment_ids"] > 0) & ~np.isin(tokens, self.special_ids)
        chosen = ordinary & (choice < self.probability)
        replacement = (other * self.num_tokens).astype(tokens.dtype)
        shown = np.where(use < HIDDEN + REPLACED, replacement, tokens)
        shown = np.where(use < HIDDEN, np.asarray(self.mask_id, tokens.dtype), shown)
        return batch | {
            "tokens": np.where(chosen, shown, tokens),
            "targets": np.where(chosen, tokens, 0),
            "weights": chosen.astype(np.float32),
        }
