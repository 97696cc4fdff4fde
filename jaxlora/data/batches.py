"""Batch i of a run as numpy arrays: a pure function of the table, the settings, the seed and i."""

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from jaxlora.core.errors import UserError
from jaxlora.data.masking import Masking
from jaxlora.data.packing import Plan, one_each, packed
from jaxlora.data.table import TokenTable

_ROUND_TO = 64


class Batches:
    """The batches of every epoch, each [accumulation, rows, T].

    T is `sequence_len` with packing or `pad`, else the longest example rounded up to a multiple of
    64 (one shape, so one compilation). Each epoch holds each example once, or those that `examples`
    lists, in that order without `shuffle`; the rows that the last batch lacks are empty (segment
    id 0, weight 0). With `packing` longer examples are placed first, or with `sequential` each in
    its turn.
    """

    def __init__(
        self,
        table: TokenTable,
        *,
        sequence_len: int,
        rows: int,
        accumulation: int = 1,
        packing: bool = False,
        sequential: bool = False,
        seed: int = 0,
        pad_id: int = 0,
        pad: bool = False,
        shuffle: bool = True,
        vocab_size: int | None = None,
        masking: Masking | None = None,
        token_types: bool = False,
        examples: NDArray[np.int64] | None = None,
    ) -> None:
        if not len(table):
            raise UserError("the data set has no example to train on.")
        lengths = table.lengths if examples is None else table.lengths[examples]
        longest = int(lengths.max())
        if longest > sequence_len:
            raise UserError(
                f"an example of the table has {longest} tokens, more than sequence_len "
                f"{sequence_len}; prepare the data again with this sequence_len."
            )
        self.table, self.rows, self.accumulation = table, rows, accumulation
        self.seed, self.pad_id, self.shuffle, self.vocab_size = seed, pad_id, shuffle, vocab_size
        self.masking, self.token_types = masking, token_types
        rounded = math.ceil(longest / _ROUND_TO) * _ROUND_TO
        self.length = sequence_len if packing or pad else min(rounded, sequence_len)
        plan = one_each(len(lengths))
        if packing:
            plan = packed(lengths, self.length, seed, sequential=sequential)
        self.plan = plan if examples is None else Plan(examples[plan.items], plan.offsets)
        self.steps_per_epoch = math.ceil(len(self.plan) / (rows * accumulation))
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def most_segments(self) -> int:
        """How many examples a row holds at most."""
        return int(np.diff(self.plan.offsets).max())

    def batch(self, step: int, rows: Collection[int] | None = None) -> dict[str, NDArray]:
        """Batch `step` (from 0, over all epochs).

        Args:
            step: number of the batch.
            rows: of each micro-batch, those that are read; the others stay empty. None for all.

        Returns:
            tokens, targets (the next token of the same segment, else 0), positions (from 0 in each
            segment), segment_ids (from 1 in each row, 0 = padding), all int32, and weights float32
            (1 where the target is trained); each [accumulation, rows, T]. With `masking`, targets
            are the tokens that were hidden. Where examples have labels these are the targets, at
            the first token of each row. With `token_types` also those, int32: 1 in a second text.
        """
        chosen = self._chosen(step)
        shape = (self.rows * self.accumulation, self.length)
        arrays = {
            "tokens": np.full(shape, self.pad_id, np.int32),
            "targets": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
        }
        if self.token_types:
            arrays["token_types"] = np.zeros(shape, np.int32)
        for row, planned in enumerate(chosen):
            if rows is None or row % self.rows in rows:
                self._fill({name: array[row] for name, array in arrays.items()}, int(planned))
        self._check(arrays, step, whole=rows is None)
        full = (self.accumulation, self.rows, self.length)
        whole = {name: array.reshape(full) for name, array in arrays.items()}
        return whole if self.masking is None else self.masking(whole, step)

    def examples(self, step: int) -> list[int]:
        """The examples of batch `step` by their numbers in the table, row by row."""
        return [int(each) for planned in self._chosen(step) for each in self.plan[int(planned)]]

    def num_tokens(self, step: int) -> int:
        """Tokens of batch `step`, padding left out, without reading them."""
        return int(self.table.lengths[self.examples(step)].sum())

    def _chosen(self, step: int) -> NDArray[np.int64]:
        epoch, index = divmod(step, self.steps_per_epoch)
        size = self.rows * self.accumulation
        return self._epoch_order(epoch)[index * size : (index + 1) * size]

    def _fill(self, row: dict[str, NDArray], planned: int) -> None:
        start = 0
        for segment, example in enumerate(self.plan[planned], 1):
            tokens, trained = self.table[int(example)]
            stop = start + len(tokens)
            row["tokens"][start:stop] = tokens
            row["targets"][start : stop - 1] = tokens[1:]
            row["weights"][start : stop - 1] = trained[1:]
            row["positions"][start:stop] = np.arange(len(tokens), dtype=np.int32)
            row["segment_ids"][start:stop] = segment
            if (labelled := self.table.label(int(example))) is not None:
                row["targets"][start], row["weights"][start] = labelled[0], 1
                if self.token_types:
                    row["token_types"][start + labelled[1] : stop] = 1
            start = stop

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.plan), dtype=np.int64)
        # A batch costs O(batch): the permutation is made once an epoch.
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.plan))
            self._order = (epoch, order)
        return self._order[1]

    def _check(self, batch: dict[str, NDArray], step: int, *, whole: bool) -> None:
        """Refuses what a device would clamp in silence, or learn as noise."""
        if self.vocab_size is None:
            return
        for name in ("tokens", "targets"):
            low, high = int(batch[name].min()), int(batch[name].max())
            if low < 0 or high >= self.vocab_size:
                raise UserError(
                    f"batch {step} holds token id {low if low < 0 else high}, outside the "
                    f"vocabulary of {self.vocab_size}; the data cache is damaged or not this "
                    "model's."
                )
        weights = batch["weights"]
        if not ((weights == 0) | (weights == 1)).all() or (whole and not weights.any()):
            kind = "weights other than 0 and 1" if weights.any() else "no trained token"
            raise UserError(f"batch {step} holds {kind}; the data cache is damaged.")
