"""Rows of JSON files: an object a line, or an array of objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.data.lines import Fault, RowOrFault, lines, one_line, open_bytes, without_mark


def read_jsonl(path: Path) -> Iterator[RowOrFault]:
    """One object a line."""
    for origin, line, fault in lines(path):
        if fault is not None:
            yield origin, fault
        elif line.strip():
            yield origin, _row(line, origin)


def _row(line: str, origin: str) -> dict[str, Any] | Fault:
    try:
        return _object(_DECODER.decode(line), origin)
    except json.JSONDecodeError as error:
        return Fault(f"{origin}: is not valid JSON: {error.msg} at column {error.colno}.")
    except (ValueError, RecursionError) as error:
        return Fault(f"{origin}: is not valid JSON: {one_line(error)}.")


def read_json(path: Path) -> Iterator[RowOrFault]:
    """A ``.json`` file is an array of objects, or one object per line."""
    with open_bytes(path) as file:
        array = without_mark(file.read(1 << 16), path).lstrip().startswith(b"[")
    if not array:
        yield from read_jsonl(path)
        return
    with open_bytes(path) as file:
        raw = without_mark(file.read(), path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; save the file as UTF-8.") from error
    yield from _array(text, path)


def _array(text: str, path: Path) -> Iterator[RowOrFault]:
    """Reads element by element, so that each one has its line."""
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        origin = f"{path}:{line}"
        try:
            value, position = _element(text, position, origin)
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}"
            raise UserError(f"{where}: is not valid JSON: {error.msg}.") from error
        except RecursionError as error:
            raise UserError(f"{origin}: is not valid JSON: {one_line(error)}.") from error
        yield origin, value
        position = _skip(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]") or not separator:
            at = text.count("\n", 0, position) + 1
            raise UserError(f"{path}:{at}: is not valid JSON: expected ',' or ']' after a row.")
        if separator == ",":
            position = _skip(text, position + 1)
    end = _skip(text, position + 1)
    if end < len(text):
        at = text.count("\n", 0, end) + 1
        raise UserError(f"{path}:{at}: is not valid JSON: text after the closing ']'.")


def _element(text: str, position: int, origin: str) -> tuple[dict[str, Any] | Fault, int]:
    """The row that starts at a position, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        # Well-formed, but not ours (a key twice, NaN): where it ends is known all the same.
        _, end = json.JSONDecoder().raw_decode(text, position)
        return Fault(f"{origin}: is not valid JSON: {one_line(error)}."), end
    return _object(value, origin), end


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" appears twice')
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _object(value: Any, origin: str) -> dict[str, Any] | Fault:
    if isinstance(value, dict):
        return value
    kind = "null" if value is None else type(value).__name__
    return Fault(f'{origin}: a row must be an object like {{"column": ...}}, got {kind}.')
