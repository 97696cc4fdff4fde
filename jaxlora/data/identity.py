"""What goes into prepared data: the parts of its cache key."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError
from jaxlora.data.sources import digest, files, is_local
from jaxlora.data.spec import DataOptions, DatasetSpec
from jaxlora.data.tokenizer import template_text, tokenizer_digest

# Packages that turn rows into text and text into tokens.
_PACKAGES = ("tokenizers", "transformers", "jinja2")


def key_parts(
    train_specs: Sequence[DatasetSpec],
    test_specs: Sequence[DatasetSpec],
    options: DataOptions,
    tokenizer: Any,
) -> dict[str, Any]:
    """Everything that the tables follow from, as JSON-like values.

    Raises:
        UserError: a data set cannot be found or read, or is for training and evaluation alike.
    """

    def described(spec: DatasetSpec) -> dict[str, Any]:
        parts: dict[str, Any] = {**dataclasses.asdict(spec), "digest": digest(spec)}
        if spec.chat is not None:
            choice = spec.chat.chat_template or options.chat_template
            text = template_text(tokenizer, choice)
            parts["template"] = hashlib.sha256(text.encode()).hexdigest()
        return parts

    train, test = map(described, train_specs), map(described, test_specs)
    # Where the cache is does not change what is in it.
    settings = dataclasses.asdict(dataclasses.replace(options, dataset_prepared_path=None))
    parts = {
        "train": list(train),
        "test": list(test),
        "options": settings,
        "tokenizer": tokenizer_digest(tokenizer),
        "code": code_version(),
    }
    _refuse_same(parts["train"], parts["test"])
    return parts


def _refuse_same(train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]) -> None:
    learned = {(each["digest"], each["split"], each["shards_idx"]) for each in train}
    for each in test:
        if (each["digest"], each["split"], each["shards_idx"]) in learned:
            raise UserError(
                f"test_datasets: {each['path']} (split {each['split']}) is training data too, so "
                "its loss would say nothing; hold rows out with val_set_size, or name other rows."
            )


@cache
def code_version() -> dict[str, str]:
    """A digest of this package's sources, and the versions of what renders and encodes."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return {"jaxlora.data": total.hexdigest(), **{name: version(name) for name in _PACKAGES}}


def stamps(specs: Sequence[DatasetSpec]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each local file, to notice one that is written to."""
    paths = [path for spec in specs if is_local(spec) for path in files(spec)]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def refuse_changed(specs: Sequence[DatasetSpec], before: Mapping[str, tuple[int, int]]) -> None:
    """Refuses files that are not those of `stamps` any more.

    Raises:
        UserError: a file was written to, replaced or removed.
    """
    try:
        after = stamps(specs)
    except OSError as error:
        raise UserError(f"{error.filename}: was removed while it was read.") from error
    for path, stamp in before.items():
        if after.get(path) != stamp:
            raise UserError(f"{path}: changed while it was read; start again when it is complete.")
