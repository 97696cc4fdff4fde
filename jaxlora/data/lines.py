"""The lines of a text file, decoded strictly, each with its origin; a bad one is a fault."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxlora.core.errors import UserError

Fault = UserError
"""What is wrong with one row; its text starts with the row's origin."""
Row = tuple[str, dict[str, Any]]
RowOrFault = tuple[str, dict[str, Any] | Fault]

# A longer line is no row of text: it is skipped in pieces, so that memory does not follow it.
_LONGEST = 1 << 28


def open_bytes(path: Path) -> BinaryIO:
    """Opens a plain or gzipped file."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore


def lines(path: Path) -> Iterator[tuple[str, str, Fault | None]]:
    """Yields ``(origin, text, fault)`` per line; the text of a faulty line is a near guess.

    Raises:
        UserError: the file is UTF-16, or it breaks off (gzip).
    """
    number = 0
    try:
        with open_bytes(path) as file:
            while raw := file.readline(_LONGEST):
                number += 1
                origin = f"{path}:{number}"
                if number == 1:
                    raw = without_mark(raw, path)
                if len(raw) == _LONGEST and not raw.endswith(b"\n"):
                    while (rest := file.readline(_LONGEST)) and not rest.endswith(b"\n"):
                        continue
                    reason = f"the line is longer than {_LONGEST >> 20} MiB; split it"
                    yield origin, "", Fault(f"{origin}: {reason}.")
                    continue
                text, fault = _decode(raw, origin)
                yield origin, text, fault
    except (OSError, EOFError, zlib.error) as error:
        where = f" after line {number}" if number else ""
        raise UserError(f"{path}: cannot be read{where}: {one_line(error)}.") from error


def without_mark(raw: bytes, path: Path) -> bytes:
    """The bytes without the byte-order mark of UTF-8."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1: the file is UTF-16; save it as UTF-8.")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _decode(raw: bytes, origin: str) -> tuple[str, Fault | None]:
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        return raw.decode("utf-8", "replace"), Fault(f"{origin}: {problem}")


def nul(text: str, origin: str) -> Fault | None:
    """A fault where a text holds a NUL character: the file is damaged, or not text."""
    if "\0" not in text:
        return None
    where = text.index("\0") + 1
    return Fault(f"{origin}: holds a NUL at character {where}; the file is damaged or not text.")


def one_line(error: BaseException) -> str:
    """The message of an error, shortened, without its end."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
