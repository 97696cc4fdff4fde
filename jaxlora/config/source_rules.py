"""Rules between the keys that say where rows come from and in what shares."""

from collections.abc import Iterator

from jaxlora.config.problem import Problem
from jaxlora.config.schema import Config
from jaxlora.remote.location import is_address, is_storage


def mixing(config: Config) -> Iterator[Problem]:
    """Weights fit the data sets, and are there for a reason."""
    strategy, weights = "dataset_mixing_strategy", config.mixing_weights
    if config.dataset_mixing_strategy == "concatenate":
        asked = {
            "mixing_weights": weights,
            "mixing_stops": config.mixing_stops != "first_exhausted",
        }
        for key in (key for key, value in asked.items() if value):
            yield Problem((key,), f"it needs {strategy}: interleave", (strategy,))
        return
    count = len(config.datasets) + len(config.pretraining_dataset)
    if weights and len(weights) != count:
        text = f"{len(weights)} weights for {count} data sets; give one each"
        yield Problem(("mixing_weights",), text, ("datasets",))


def streaming(config: Config) -> Iterator[Problem]:
    """A stream ends with the steps, and rows are never held out of it."""
    if not config.streaming:
        return
    if config.max_steps is None:
        yield Problem(
            ("streaming",), "it needs max_steps, which says where to stop", ("max_steps",)
        )
    if config.val_set_size:
        text = "rows of a stream cannot be held out; use test_datasets"
        yield Problem(("val_set_size",), text, ("streaming",))
    if config.dataset_exact_deduplication:
        text = "it would remember every row of a stream; remove one of them"
        yield Problem(("dataset_exact_deduplication",), text, ("streaming",))


def shards(config: Config) -> Iterator[Problem]:
    """A shard is one of those there are."""
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(getattr(config, key)):
            if entry.shards_idx >= (entry.shards or 1):
                text = f"{entry.shards_idx} is not below shards, which is {entry.shards or 1}"
                yield Problem((key, i, "shards_idx"), text)
            if entry.shards and entry.preprocess_shards:
                yield Problem((key, i, "shards"), "set it or preprocess_shards, not both")


def addresses(config: Config) -> Iterator[Problem]:
    """Addresses are of object storage, where there may be one at all."""
    for key in ("output_dir", "resume_from_checkpoint", "base_model", "lora_model_dir"):
        value = getattr(config, key)
        if isinstance(value, str) and is_address(value) and not is_storage(value):
            text = f"{value}: not object storage that jaxlora reads; expected gs://, s3:// or az://"
            yield Problem((key,), text)
    if config.dataset_prepared_path and is_address(config.dataset_prepared_path):
        text = f"{config.dataset_prepared_path}: tokens are mapped into memory; give a folder here"
        yield Problem(("dataset_prepared_path",), text)
