"""The account of one data set's rows while they are read: kept, dropped, bad."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxlora.core.errors import UserError
from jaxlora.data.lines import Fault
from jaxlora.data.report import DIVIDED, TRUNCATED, SourceReport
from jaxlora.data.spec import DataOptions, DatasetSpec

BAD = "bad row: "
"""How the reason of a dropped row starts that on_bad_row: error would have raised."""
_MOST_REASONS = 20
_OTHER = f"{BAD}of other kinds"
# From here on a message tells what this one row holds, or what to do about it.
_DETAIL = re.compile(r"[;(]|\.( |$)|, (got|the header has|expected)")

T = TypeVar("T")


def drafted(
    make: Callable[[Mapping[str, Any], str], T],
    row: Mapping[str, Any] | Fault,
    origin: str,
    options: DataOptions,
) -> T | str:
    """What `make` makes of a row, or why it is bad.

    Raises:
        UserError: the row is bad and `on_bad_row` is error, or the mistake is not the row's.
    """
    try:
        if isinstance(row, Fault):
            raise row
        return make(row, origin)
    except UserError as error:
        # What is wrong with the settings does not start with the place of a row.
        if options.on_bad_row != "skip" or not str(error).startswith(f"{origin}: "):
            raise
        return reason(error, origin)


def reason(error: UserError, origin: str) -> str:
    """The kind of a row's mistake: its message without what differs from row to row.

    >>> reason(UserError('a:7: the column "x" is int (5); expected text.'), "a:7")
    'bad row: the column "x" is int'
    """
    text = str(error).removeprefix(f"{origin}: ")
    short = _DETAIL.split(text, maxsplit=1)[0].strip(" .")
    return BAD + re.sub(r"(?<= )\d+", "N", short)[:80]


class Account:
    """Counts what becomes of each row of a data set."""

    def __init__(self, spec: DatasetSpec, options: DataOptions) -> None:
        self.spec, self.limit = spec, options.max_bad_rows
        self.read = self.kept = self.truncated = self.divided = self.examples = 0
        self.dropped: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, origin: str, examples: int, why: str | None) -> None:
        """One row: how many examples it gave, and what happened to it, or None."""
        self.read += 1
        self.examples += examples
        if examples:
            self.kept += 1
            self.truncated += why == TRUNCATED
            self.divided += why == DIVIDED
            return
        assert why is not None
        if why.startswith(BAD) and why not in self.dropped and len(self.dropped) >= _MOST_REASONS:
            why = _OTHER
        self.dropped[why] = self.dropped.get(why, 0) + 1
        self.first.setdefault(why, origin)

    def close(self) -> SourceReport:
        """The report, once every row was added.

        Raises:
            UserError: there is no row, none to train on, or too many are bad.
        """
        path, split = self.spec.path, self.spec.split
        if self.read == 0:
            raise UserError(f"datasets: {path} (split {split}) holds no row.")
        bad = sum(count for why, count in self.dropped.items() if why.startswith(BAD))
        if bad > self.limit * self.read:
            raise UserError(
                f"datasets: {bad} of {self.read} rows of {path} are bad, more than max_bad_rows "
                f"{self.limit:g} of them: {self._reasons()}; mend the file or raise max_bad_rows."
            )
        if self.kept == 0:
            raise UserError(
                f"datasets: no row of {path} can be trained on: {self.read} read, "
                f"{self._reasons()}."
            )
        return SourceReport(
            path,
            split,
            self.read,
            self.kept,
            self.dropped,
            self.truncated,
            self.examples,
            self.first,
            self.divided,
        )

    def _reasons(self) -> str:
        return ", ".join(
            f"{count} {why} (first {self.first[why]})" for why, count in self.dropped.items()
        )
