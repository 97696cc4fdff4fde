"""How much of a stream is read: what the steps of the run need, and no more."""

from fractions import Fraction

from jaxlora.data.spec import DataOptions


class Enough:
    """Says when data set `number` has given what is asked of it.

    >>> enough = Enough(DataOptions(64, stream_examples=10, stream_weights=(3, 1)), 1)
    >>> enough(2, 50, 12, 500), enough(3, 60, 13, 510)
    (False, True)
    """

    def __init__(self, options: DataOptions, number: int) -> None:
        share, self.weights = Fraction(1), options.stream_weights
        if self.weights:
            exact = [Fraction(str(weight)) for weight in self.weights]
            share = exact[number] / sum(exact)
        self.examples, self.tokens = (
            None if limit is None else -(-limit * share // 1)
            for limit in (options.stream_examples, options.stream_tokens)
        )

    def __call__(self, examples: int, tokens: int, all_examples: int, all_tokens: int) -> bool:
        """Whether to stop, by what this data set gave so far, and what all together did."""
        if not self.weights:
            examples, tokens = all_examples, all_tokens
        return (self.examples is not None and examples >= self.examples) or (
            self.tokens is not None and tokens >= self.tokens
        )
