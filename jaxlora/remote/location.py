"""Addresses of object storage: which library opens them, and where their copies lie here."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError

# Scheme: the package that fsspec needs for it, None if it comes with fsspec.
_PACKAGES: Mapping[str, str | None] = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
    "memory": None,
    "file": None,
    "local": None,
}
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<path>.*)", re.DOTALL)


def is_address(text: str) -> bool:
    """Whether a text is an address (of any kind) rather than a path or a hub id.

    >>> is_address("gs://bucket/run"), is_address("https://x/y"), is_address("outputs/run")
    (True, True, False)
    """
    return _ADDRESS.fullmatch(text) is not None


def is_storage(text: str) -> bool:
    """Whether a text is an address of object storage.

    >>> is_storage("s3://bucket/rows.jsonl"), is_storage("https://x/rows.jsonl")
    (True, False)
    """
    match = _ADDRESS.fullmatch(text)
    return match is not None and match["scheme"] in _PACKAGES


def package_for(text: str) -> str | None:
    """Returns the pip package that a path or address needs beside jaxlora's own.

    >>> package_for("gs://bucket/run"), package_for("outputs/run")
    ('gcsfs', None)
    """
    match = _ADDRESS.fullmatch(text)
    return _PACKAGES.get(match["scheme"]) if match else None


def cache_root() -> Path:
    """``$JAXLORA_CACHE``, or ``~/.cache/jaxlora``."""
    root = os.environ.get("JAXLORA_CACHE")
    return Path(root).absolute() if root else Path.home() / ".cache" / "jaxlora"


def local_copy(address: str, kind: str = "remote") -> Path:
    """Where the copy of an address lies on this machine, or would: same address, same place.

    Args:
      address: of object storage.
      kind: folder of the cache.

    Raises:
      UserError: not an address of object storage, or one that cannot be a path.
    """
    scheme, path = _parts(address)
    return cache_root() / kind / scheme / path


def open_storage(address: str) -> tuple[Any, str]:
    """Returns an fsspec file system and the path of the address on it.

    Credentials are taken from the environment alone.

    Raises:
      UserError: not an address of object storage, or its package is not installed.
    """
    import fsspec

    scheme, _ = _parts(address)
    package = _PACKAGES[scheme]
    options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    try:
        return fsspec.core.url_to_fs(address.rstrip("/"), **options)
    except ImportError:
        raise UserError(
            f"{address}: {scheme}:// needs the package {package}; pip install {package}."
        ) from None
    except Exception as error:  # each library has errors of its own
        raise UserError(f"{address}: cannot be opened: {reason(error)}") from error


def exists(text: str) -> bool:
    """Whether a path or an address of object storage is a file.

    Raises:
      UserError: the storage cannot be read.
    """
    if not is_storage(text):
        return os.path.isfile(text)
    storage, path = open_storage(text)
    try:
        return storage.isfile(path)
    except Exception as error:  # each library has errors of its own
        raise UserError(f"{text}: cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Returns what an error of a storage library says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _parts(address: str) -> tuple[str, str]:
    match = _ADDRESS.fullmatch(address)
    if match is None or match["scheme"] not in _PACKAGES:
        scheme = match["scheme"] if match else address
        raise UserError(
            f"{address}: {scheme}:// is no object storage that jaxlora reads; expected "
            f"{', '.join(f'{known}://' for known in _PACKAGES)}."
        )
    path = match["path"].strip("/")
    if "@" in path.partition("/")[0]:
        raise UserError(
            f"{match['scheme']}://: credentials do not belong in an address; put them into the "
            "environment, as the storage's own tools read them."
        )
    if not path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise UserError(f"{address!r}: is not the address of a file or folder.")
    return match["scheme"], path
