"""Where a model or adapter is: a folder, or a hub id or object storage that is copied once."""

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from jaxlora.core.errors import UserError
from jaxlora.remote.fetch import fetch
from jaxlora.remote.location import is_storage

# Everything a model or adapter in Hugging Face's layout needs, and no pickle.
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
# Sub-folders hold other formats (onnx/, original/), consolidated*.safetensors a second copy.
_UNWANTED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def resolve(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """Returns the local folder of a model or adapter, downloading it if it is a hub id.

    Args:
      path_or_id: a folder, a GGUF file (which is returned), an address of object storage, else
        ``owner/name`` on the hub.
      revision: branch, tag or commit on the hub; ignored for a folder.

    Raises:
      UserError: no such folder or repository, no access to it, or no network and not cached.
    """
    text = os.fspath(path_or_id)
    if is_storage(text):
        return fetch(text, "model", _is_wanted)
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return folder
    if text and folder.is_file() and folder.suffix == ".gguf":
        return folder
    if text and folder.exists():
        raise UserError(
            f"{text} is a file; expected the folder that holds it, a GGUF file, or a hub id."
        )
    if not _HUB_ID.fullmatch(text):
        raise UserError(
            f"{text}: no such folder (it looks like a path, so it was not looked up on the hub); "
            "expected a folder that exists, or a hub id such as owner/name."
        )
    return _download(text, revision)


def resolve_config(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """Returns a folder with config.json of a model; of a hub id, nothing else is downloaded.

    Args, raises: as `resolve`.
    """
    text = os.fspath(path_or_id)
    if is_storage(text):
        return fetch(text, "model", lambda name: name == "config.json")
    if not _HUB_ID.fullmatch(text) or Path(text).expanduser().exists():
        return resolve(path_or_id, revision)
    return _download(text, revision, ["config.json"])


def _is_wanted(name: str) -> bool:
    """Whether a file of a folder on object storage is one that a hub repository would give."""
    matches = [fnmatchcase(name, pattern) for pattern in _UNWANTED]
    return not any(matches) and any(fnmatchcase(name, pattern) for pattern in _WANTED)


def _download(repository: str, revision: str | None, wanted: Sequence[str] = _WANTED) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=list(wanted), ignore_patterns=_UNWANTED
        )
    except Exception as error:  # the client lets errors of several HTTP libraries through
        at = f"{repository} at revision {revision}" if revision else repository
        raise UserError(f"{at}: {_reason(repository, error)}.") from error
    return Path(folder)


def _reason(repository: str, error: Exception) -> str:
    from huggingface_hub import errors

    # A gated repository is a kind of "not found" to the client, so it is asked for first.
    if isinstance(error, errors.GatedRepoError):
        return (
            "the hub wants your consent to its terms; accept them at "
            f"https://huggingface.co/{repository} and log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision; check its name"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "neither a folder here nor a repository on the hub; check the spelling, and log in "
            "with `hf auth login` if it is private"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "no folder here, not in the local cache, and the hub cannot be reached (offline?); "
            "connect, or give the folder of a local copy"
        )
    lines = str(error).split("\n")
    return f"the hub did not deliver it ({lines[0] or type(error).__name__}); try again later"
