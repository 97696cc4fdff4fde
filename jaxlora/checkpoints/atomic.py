"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxlora.core.errors import UserError


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into; its files move to `folder` on success, else vanish.

    A new `folder` appears in one rename. In an existing one each file is replaced in one rename,
    JSON files last, so that a reader never meets a half-written file.

    Raises:
      UserError: the disk is full, or the place cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    stage = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        stage.mkdir(parents=True)
        yield stage
        for path in stage.iterdir():
            _sync(path)
        if folder.is_dir():
            for path in sorted(stage.iterdir(), key=lambda p: (p.suffix == ".json", p.name)):
                os.replace(path, folder / path.name)
            _sync(folder)
        else:
            os.rename(stage, folder)
        _sync(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); free space or choose "
            "another output folder."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sync(path: Path) -> None:
    """Forces a file or folder to disk: after a power cut a rename may survive its data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
