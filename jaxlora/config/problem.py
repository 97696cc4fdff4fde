"""A mistake in a configuration."""

import dataclasses

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A mistake in the file: `path` of the key, what is wrong, and the other keys it concerns."""

    path: Path
    text: str
    others: tuple[str, ...] = ()
