"""Says in words what a key may hold; the errors and the reference page share it."""

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from jaxlora.config.values import Section

_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
_NAMES = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}


def section_of(annotation: Any) -> type[Section] | None:
    """Returns the section that an annotation holds, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def expected(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Returns the values of a type in words.

    >>> expected(Annotated[int, FieldInfo(ge=1)] | Literal["auto"] | None)
    'a whole number >= 1 or auto'
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(args[0], (*args[1:], *metadata))
    if origin in (Union, types.UnionType):
        members = [member for member in args if member is not type(None)]
        return " or ".join(expected(member, metadata) for member in members)
    if origin is Literal:
        *first, last = map(str, args)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        return f"a list of {_plural(args[0])}"
    if section := section_of(annotation):
        return f"a mapping of {', '.join(section.model_fields)}"
    if annotation is dict or origin is dict:
        return "a mapping"
    return _NAMES[annotation] + _bounds(metadata)


def _plural(item: Any) -> str:
    if section_of(item):
        return "mappings"
    return expected(item).replace("a whole number", "whole numbers")


def _bounds(metadata: Iterable[Any]) -> str:
    constraints = []
    for entry in metadata:
        constraints += entry.metadata if isinstance(entry, FieldInfo) else [entry]
    found = {
        sign: f"{sign} {getattr(constraint, name):,}"
        for constraint in constraints
        for name, sign in _BOUNDS
        if getattr(constraint, name, None) is not None
    }
    return f" {' and '.join(found.values())}" if found else ""
