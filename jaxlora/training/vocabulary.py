"""The tokens of a run: its tokenizer, the size of its embedding, and whether new ones learn."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxlora.checkpoints import hub
from jaxlora.checkpoints.adapter import LoadedAdapter
from jaxlora.config import settings
from jaxlora.config.schema import Config
from jaxlora.core.errors import UserError
from jaxlora.data.new_tokens import Extended, extend_tokenizer
from jaxlora.data.tokenizer import load_tokenizer
from jaxlora.lora.parts import Parts, vocabulary_tables
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import ParamSpec

_MULTIPLE = 32  # resize_token_embeddings_to_32x


def open_tokenizer(config: Config, folder: Path | None = None) -> Extended:
    """Returns the tokenizer of a run, with its new tokens.

    Args:
      config: the run.
      folder: where it is if `tokenizer_config` does not say; None: with the base model.

    Raises:
      UserError: no tokenizer there, or tokens that cannot be added.
    """
    source, revision = config.tokenizer_config or folder, None
    if source is None:
        source, revision = config.base_model, config.revision_of_model
    tokenizer = load_tokenizer(source, revision=revision)
    return extend_tokenizer(tokenizer, settings.new_tokens(config))


def tokenizer_folder(
    config: Config, folder: Path, stored: ModelConfig, start: LoadedAdapter | None
) -> Path:
    """Returns where the tokenizer is: an adapter for more tokens than its base has brings its own.

    Args:
      config: the run.
      folder: of the base model.
      stored: shape of the base on disk.
      start: the adapter of `lora_model_dir`.
    """
    if start is None or start.cfg.vocab_size == stored.vocab_size:
        return folder
    beside = hub.resolve(config.lora_model_dir or "")
    return beside if (beside / "tokenizer.json").is_file() else folder


def rows_wanted(
    config: Config, stored: ModelConfig, tokens: Extended, start: LoadedAdapter | None
) -> int:
    """Returns how many rows the embedding of a run has: never fewer than the base's.

    Bases often have more rows than tokens; new tokens take those first.

    Args:
      config: the run.
      stored: shape of the base on disk.
      tokens: from `open_tokenizer`.
      start: the adapter of `lora_model_dir`, which has as many rows as it has.

    Raises:
      UserError: a tokenizer that is too large before tokens are added to it, or new tokens for an
        adapter that has no room for them.
    """
    rows = stored.vocab_size if start is None else start.cfg.vocab_size
    vocabulary = set(tokens.tokenizer.get_vocab().values())
    own = max(vocabulary - tokens.named - tokens.added)
    if own >= rows:
        raise UserError(
            f"{config.base_model}: the tokenizer has token id {own} but the embedding only {rows} "
            "rows; use this model's own tokenizer, or list the tokens that are new under tokens."
        )
    needed = 1 + max(vocabulary)
    if config.resize_token_embeddings_to_32x:
        needed = math.ceil(needed / _MULTIPLE) * _MULTIPLE
    if start is not None and needed > rows:
        raise UserError(
            f"tokens: {needed} rows are needed and the adapter of lora_model_dir is for {rows}; "
            "merge it into its base first, and start from the merged model."
        )
    return max(needed, rows)


def check_learned(
    config: Config,
    stored: ModelConfig,
    specs: Mapping[str, ParamSpec],
    tokens: Extended,
    learning: tuple[Collection[str], Parts],
) -> None:
    """Refuses new tokens that would not be learned, as Axolotl does.

    Args:
      config: the run.
      stored: shape of the base on disk.
      specs: every parameter.
      tokens: from `open_tokenizer`.
      learning: leaves with low-rank pairs, and what trains with all its numbers.

    Raises:
      UserError: the embedding of the new tokens, or the head that is to produce them, is frozen.
    """
    beyond = {token for token in tokens.named if token >= stored.vocab_size}
    new = sorted((tokens.added | beyond) - tokens.pad)
    targets, parts = learning
    tables = vocabulary_tables(specs)
    by_row = any(part.rows is not None for path, part in parts.items() if path in tables)
    for path, spec in tables.items():
        part = parts.get(path)
        if not new or path in targets or (part is not None and set(new) <= set(part.rows or new)):
            continue
        if part is None and by_row and spec.kind == "head":
            continue  # rows of the embedding alone are a choice: tokens that are only read
        names = [each.modules()[0].rpartition(".")[2] for each in tables.values()]
        advice = (
            f"set lora_modules_to_save: [{', '.join(names)}], or "
            f"peft_trainable_token_indices: {new[:8]}{' and so on' if len(new) > 8 else ''}"
            if config.adapter
            else f"let unfrozen_parameters match {spec.hf_names[0]}"
        )
        name = spec.modules()[0].rpartition(".")[2]
        raise UserError(
            f"tokens: {name} is frozen, so the new tokens would not be learned; {advice}."
        )


def token_notes(
    cfg: ModelConfig, specs: Mapping[str, ParamSpec], tokens: Extended, parts: Parts
) -> tuple[str, ...]:
    """Returns a line for each thing that the user should know of the tokens of a run.

    Args:
      cfg: shape of the model that is trained.
      specs: every parameter.
      tokens: from `open_tokenizer`.
      parts: what trains with all its numbers.
    """
    found = [f"tokens: {text} is in the vocabulary already" for text in tokens.known]
    head = "embed/embedding" if cfg.tie_embedding else "lm_head/kernel"
    if "lm_head/bias" in specs and head in parts and parts[head].by_token:
        found.append(
            "peft_trainable_token_indices: the head has a bias, which PEFT leaves out where rows "
            "of the head train; its logits lack it"
        )
    return tuple(found)
