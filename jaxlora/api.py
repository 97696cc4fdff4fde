"""The verbs of the command line as functions, for notebooks and scripts.

Each takes paths or hub ids. Errors a user can mend are `jaxlora.UserError`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.checkpoints.load import QuantSpec
from jaxlora.config import settings
from jaxlora.config.load import load_config
from jaxlora.config.schema import Config
from jaxlora.data.prepare import Prepared, prepare
from jaxlora.generation.classifier import Classification, load_classifier
from jaxlora.generation.model import LanguageModel, load
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.scoring import Score
from jaxlora.inspection import inspect
from jaxlora.merging import MergeDifferences, merge, merge_differences
from jaxlora.parallel.mesh import batch_shards, make_mesh
from jaxlora.planning.estimate import Estimate
from jaxlora.planning.out_of_memory import explained
from jaxlora.planning.plan import plan as _plan
from jaxlora.planning.remat import choose
from jaxlora.planning.topology import parse as parse_topology
from jaxlora.training.evaluation import Evaluation
from jaxlora.training.evaluation import evaluate as _evaluate
from jaxlora.training.export import export
from jaxlora.training.labels import labels_of_config
from jaxlora.training.loop import train as _train
from jaxlora.training.results import TrainResult
from jaxlora.training.vocabulary import open_tokenizer
from jaxlora.verification import Verdict, verify

__all__ = [
    "Classification",
    "Config",
    "Estimate",
    "Evaluation",
    "LanguageModel",
    "MergeDifferences",
    "QuantSpec",
    "SamplingOptions",
    "Score",
    "TrainResult",
    "Verdict",
    "assets",
    "classify",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "load_config",
    "merge",
    "merge_differences",
    "plan",
    "preprocess",
    "train",
    "verify",
]

Source = Config | str | os.PathLike[str] | Mapping[str, Any]


def train(
    source: Source, *overrides: str, quiet: bool = False, profile: bool = False
) -> TrainResult:
    """Fine-tunes as a configuration says and returns the results.

    Args:
      source: a `Config`, a YAML or Python file, or a mapping of keys.
      overrides: as on the command line, ``"--lora_r=32"``.
      quiet: print nothing.
      profile: record some steps in ``output_dir/profile``, for Perfetto and TensorBoard.

    >>> result = train("configs/quickstart.yml", "--max_steps=10")  # doctest: +SKIP
    >>> result.output_dir  # doctest: +SKIP
    PosixPath('outputs/quickstart')
    """
    config = _config(source, overrides)
    with explained(config):
        return _train(config, quiet=quiet, profile=profile, settle=choose)


def plan(source: Source, *overrides: str, topology: str | None = None) -> Estimate:
    """Returns what memory and time a run takes, by compiling its step from shapes alone.

    Args:
      source, overrides: as for `train`; neither weights nor data are read.
      topology: ``"v5e:4x4"``, ``"h100:8"`` and others; None: the devices of this machine.

    >>> plan("configs/quickstart.yml", topology="v5e:1x1").fits  # doctest: +SKIP
    True
    """
    return _plan(_config(source, overrides), parse_topology(topology))


def evaluate(
    source: Source, *overrides: str, adapter: str | os.PathLike[str] | None = None
) -> Evaluation:
    """Scores base + adapter on the held-out data of a configuration.

    Args:
      source, overrides: as for `train`.
      adapter: adapter folder or hub id; None scores the base alone (or `lora_model_dir`).
    """
    if adapter is not None:
        overrides = (*overrides, f"--lora_model_dir={os.fspath(adapter)}")
    return _evaluate(_config(source, overrides))


def generate(
    model: str | os.PathLike[str],
    prompts: str | Sequence[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    raw: bool = False,
    **options: Any,
) -> list[str]:
    """Returns the answers of a model to one prompt or several.

    Args:
      model: folder or hub id of a model, or of an adapter that names its base.
      prompts: user messages.
      adapter: folder or hub id of an adapter to put on top.
      raw: continue the text as it is, without the chat template.
      options: fields of `SamplingOptions`, e.g. ``temperature=0.7, max_new_tokens=64``.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    loaded = load(os.fspath(model), None if adapter is None else os.fspath(adapter))
    return loaded.generate(texts, SamplingOptions(**options), raw=raw)


def classify(
    model: str | os.PathLike[str],
    texts: str | Sequence[str | tuple[str, str]],
    *,
    adapter: str | os.PathLike[str] | None = None,
) -> list[Classification]:
    """Returns the label of one text, of several, or of pairs of texts, with probabilities.

    Args:
      model: folder or hub id of a classifier, or of an adapter that names its base.
      texts: what to label.
      adapter: folder or hub id of an adapter to put on top.
    """
    several = [texts] if isinstance(texts, str) else list(texts)
    loaded = load_classifier(os.fspath(model), None if adapter is None else os.fspath(adapter))
    return loaded.classify(several)


def preprocess(source: Source, *overrides: str) -> tuple[Prepared, Any]:
    """Tokenizes the data of a configuration into the cache; returns it with the tokenizer."""
    config = _config(source, overrides)
    tokenizer = open_tokenizer(config).tokenizer
    replicas = batch_shards(make_mesh(settings.mesh_sizes(config))) if config.streaming else 1
    prepared = prepare(
        settings.train_specs(config),
        settings.held_out_specs(config),
        settings.data_options(config, labels_of_config(config), replicas=replicas),
        tokenizer,
    )
    return prepared, tokenizer


def assets() -> Path:
    """Returns the folder of the embedded tiny model and the quickstart data."""
    return Path(__file__).parent / "assets"


def _config(source: Source, overrides: Sequence[str]) -> Config:
    if not isinstance(source, Config):
        return load_config(source, overrides)
    if not overrides:
        return source
    written = source.model_dump(mode="json", exclude_unset=True)
    foreign = written.pop("foreign", {})
    return load_config({**written, **foreign}, overrides)
