"""The record that makes a checkpoint count: step, meta, leaves, and every file with its digest.

Orbax stores no digest of the array bytes (one flipped bit is restored silently), does not fsync all
of its files and does not compare dtypes; the manifest is what a restore is checked against.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not the bytes that were saved."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      step: optimizer steps done.
      meta: the caller's JSON object.
      leaves: ``{path: (shape, dtype name)}`` of the saved arrays, path as `leaf_paths` gives it.
      files: ``{relative path: (bytes, sha256)}`` of every file except the manifest.
    """

    step: int
    meta: dict[str, Any]
    leaves: dict[str, tuple[tuple[int, ...], str]]
    files: dict[str, tuple[int, str]]


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Returns ``{path: leaf}`` of any pytree, optax states included, in tree order.

    Raises:
      TypeError: a leaf is not an array, or is a typed PRNG key (pass `jax.random.key_data`).

    >>> list(leaf_paths({"a": (np.zeros(2), np.zeros(3))}))
    ["['a'][0]", "['a'][1]"]
    """
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if name in flat:
            raise TypeError(f"Two leaves of the state are both called {name}.")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{name} is a {type(leaf).__name__}, not an array.")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed PRNG key; save jax.random.key_data(key).")
        flat[name] = leaf
    return flat


def describe(leaves: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns ``{path: (shape, dtype name)}`` of array-like leaves."""
    return {name: (tuple(x.shape), np.dtype(x.dtype).name) for name, x in leaves.items()}


def seal(folder: Path, step: int, meta: dict, leaves: dict) -> None:
    """Fsyncs every file and folder below `folder`, and writes and fsyncs its manifest."""
    files: dict[str, tuple[int, str]] = {}
    for relative, path in _files(folder).items():
        with path.open("rb") as file:
            files[relative] = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
            os.fsync(file.fileno())
    body = {"format": FORMAT, "step": step, "meta": meta, "leaves": leaves, "files": files}
    body["digest"] = _digest(body)
    write_durably(folder / MANIFEST, json.dumps(body, indent=1))
    for parent, _, _ in os.walk(folder, topdown=False):
        fsync_folder(Path(parent))


def read(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint folder.

    Raises:
      DamagedCheckpoint: it is absent or does not match its own digest.
      UserError: a newer jaxlora wrote it.
    """
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        intact = body.pop("digest") == _digest(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is missing or damaged.") from error
    if not intact:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} does not match its digest.")
    if body["format"] != FORMAT:
        raise UserError(
            f"{folder}: checkpoint format {body['format']}, this jaxlora reads {FORMAT}; "
            "use the version that wrote it."
        )
    return Manifest(
        step=body["step"],
        meta=body["meta"],
        leaves={name: (tuple(shape), dtype) for name, (shape, dtype) in body["leaves"].items()},
        files={name: (size, digest) for name, (size, digest) in body["files"].items()},
    )


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every file with the manifest, byte for byte through its digest.

    Raises:
      DamagedCheckpoint: names the first file that is missing or differs.
    """
    # Only files found by walking are opened: a manifest cannot make us read outside its folder.
    found = _files(folder)
    for relative, (size, digest) in manifest.files.items():
        path = found.get(relative)
        if path is None:
            raise DamagedCheckpoint(f"{folder}: file {relative} is missing.")
        try:
            with path.open("rb") as file:
                intact = os.fstat(file.fileno()).st_size == size
                intact = intact and hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError as error:
            raise DamagedCheckpoint(f"{folder}: cannot read {relative}: {error}.") from error
        if not intact:
            raise DamagedCheckpoint(f"{folder}: file {relative} differs from what was saved.")


def check_target(folder: Path, manifest: Manifest, target: Mapping[str, Any]) -> None:
    """Compares paths, shapes and dtypes of the saved leaves with those wanted; nothing is cast.

    Raises:
      UserError: names the leaf, what was found and what was expected.
    """
    wanted = describe(target)
    for name in sorted(wanted.keys() | manifest.leaves.keys()):
        saved, expected = manifest.leaves.get(name), wanted.get(name)
        if saved != expected:
            raise UserError(
                f"{folder}: leaf {name} is {_show(saved)} in the checkpoint and {_show(expected)} "
                "in this run; resume with the config that saved it."
            )


def write_durably(path: Path, text: str) -> None:
    """Writes and fsyncs a file; the caller fsyncs its folder."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes the names inside `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> dict[str, Path]:
    """Regular files below `folder` by relative POSIX path; links are neither followed nor named."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path != folder / MANIFEST
    }


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _show(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
