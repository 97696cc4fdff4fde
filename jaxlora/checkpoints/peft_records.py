"""What an adapter file of ours tells beyond PEFT's words, in the metadata of its safetensors file,
which PEFT does not read."""

import dataclasses
import json
from pathlib import Path

from jaxlora.checkpoints.adapter_files import open_adapter
from jaxlora.checkpoints.load import QuantSpec
from jaxlora.core.errors import UserError

FINGERPRINT = "jaxlora_base"
_STORAGE = "jaxlora_base_storage"
_SPLIT = "jaxlora_base_split"


def records(
    *, fingerprint: str | None, storage: QuantSpec | None, split: str | None
) -> dict[str, str]:
    """Returns the metadata of an adapter.

    Args:
      fingerprint: `base_fingerprint` of the base; None or nothing: not known.
      storage: how the base was quantized in training.
      split: initializer by which the adapter started as a part of a base that was quantized then.

    >>> records(fingerprint="ab12", storage=None, split="pissa")
    {'jaxlora_base': 'ab12', 'jaxlora_base_split': 'pissa'}
    """
    told = None
    if storage is not None:
        kept = {k: v for k, v in dataclasses.asdict(storage).items() if v is not None}
        told = json.dumps(kept)
    found = {FINGERPRINT: fingerprint, _STORAGE: told, _SPLIT: split}
    return {name: value for name, value in found.items() if value}


def trained_storage(folder: Path) -> QuantSpec | None:
    """Returns how the base was quantized while this adapter was trained; None: not, or not told.

    Raises:
      UserError: no adapter there, or a record that cannot be read.
    """
    written = open_adapter(Path(folder)).tensors.metadata.get(_STORAGE)
    try:
        return None if written is None else QuantSpec(**json.loads(written))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder}: {_STORAGE} in the metadata of its safetensors file is {written!r} "
            f"({error}); export the adapter again."
        ) from error


def trained_split(folder: Path) -> str | None:
    """Returns the initializer by which an adapter started as a part of its base (PiSSA and others),
    if the rest of the base was quantized in training; None: it did not, or does not tell."""
    return open_adapter(Path(folder)).tensors.metadata.get(_SPLIT)
