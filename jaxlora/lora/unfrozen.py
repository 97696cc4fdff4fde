"""Which parameters train without an adapter: Axolotl's ``unfrozen_parameters``."""

import re
from collections.abc import Mapping, Sequence

from jaxlora.core.errors import UserError, did_you_mean
from jaxlora.lora.parts import Described, Part, Parts, of_layers, tensors_of_layers


def unfrozen(specs: Mapping[str, Described], patterns: Sequence[str]) -> Parts:
    """Returns the parameters that Axolotl's ``unfrozen_parameters`` trains.

    A pattern is a regular expression that matches the beginning of a parameter's Hugging Face
    name; ``[start:end]`` or ``[row]`` after it leaves only those rows of the tensors.

    Raises:
      UserError: a pattern that matches no parameter, with the nearest; ranges that overlap, differ
        between layers, or go beyond the tensor.
    """
    found: dict[str, dict[int, list[tuple[int, int | None] | None]]] = {}
    for pattern, rows in map(_split_range, patterns):
        hits = [
            (path, position)
            for path, spec in specs.items()
            for position, names in enumerate(tensors_of_layers(spec))
            if any(pattern.match(name) for name in names)
        ]
        if not hits:
            raise UserError(_no_parameter(specs, pattern.pattern))
        for path, position in hits:
            found.setdefault(path, {}).setdefault(position, []).append(rows)
    return {path: _of_ranges(specs[path], layers) for path, layers in found.items()}


def _split_range(text: str) -> tuple[re.Pattern[str], tuple[int, int | None] | None]:
    ranged = re.fullmatch(r"(.+)\[(\d*)(:?)(\d*)\]", text)
    pattern = ranged[1] if ranged else text
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"unfrozen_parameters: bad regular expression {pattern!r}: {error}."
        ) from None
    if ranged is None or not (ranged[2] or ranged[4]):
        return compiled, None
    start = int(ranged[2] or 0)
    if not ranged[3]:
        return compiled, (start, start + 1)
    return compiled, (start, int(ranged[4]) if ranged[4] else None)


def _no_parameter(specs: Mapping[str, Described], pattern: str) -> str:
    names = [tensors_of_layers(spec)[0][0] for spec in specs.values()]
    plain = re.sub(r"[\\^$]|\.\*", "", pattern)
    return (
        f"unfrozen_parameters: {pattern!r} matches no parameter.{did_you_mean(plain, names)} "
        f"Parameters are named like {names[0]} and {names[-1]}."
    )


def _of_ranges(spec: Described, layers: Mapping[int, list]) -> Part:
    ranges = {frozenset(wanted) if None not in wanted else None for wanted in layers.values()}
    tensors = tensors_of_layers(spec)
    name = tensors[min(layers)][0]
    if ranges == {None}:
        return of_layers(spec, sorted(layers))
    if len(ranges) > 1 or len(layers) < len(tensors) or len(tensors[0]) > 1:
        raise UserError(
            f"unfrozen_parameters: {name}: a range of rows must be the same in every layer, and of "
            "one tensor; leave the range out or let the pattern match all layers."
        )
    axis = 1 if spec.transposed else 0
    size, rows = spec.shape[axis], set()
    for start, stop in ranges.pop() or ():
        stop = size if stop is None else stop
        if not start < stop <= size:
            raise UserError(
                f"unfrozen_parameters: {name} has {size} rows, so [{start}:{stop}] is no range of "
                f"them; expected one within [0:{size}]."
            )
        rows |= set(range(start, stop))
    if len(rows) == size:
        return of_layers(spec, sorted(layers))
    stacked = spec.layers is not None
    by_token = spec.kind in ("embedding", "head")
    return Part(stacked, None, tuple(sorted(rows)), axis + stacked, by_token)
