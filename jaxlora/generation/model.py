"""A model ready to answer: base weights, adapter on top, tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlora.checkpoints import hub
from jaxlora.checkpoints.adapter import LoadedAdapter, read_adapter
from jaxlora.checkpoints.adapter_files import base_name
from jaxlora.checkpoints.fingerprint import base_fingerprint
from jaxlora.checkpoints.fitted import load_base
from jaxlora.checkpoints.json_files import read_json_object
from jaxlora.checkpoints.load import QuantSpec, read_model_config
from jaxlora.checkpoints.peft_config import CONFIG_FILE
from jaxlora.checkpoints.peft_records import trained_storage
from jaxlora.core.errors import UserError
from jaxlora.core.tree import Tree
from jaxlora.data.chat import prompt_ids, template_of
from jaxlora.data.template import ChatTemplate
from jaxlora.data.tokenizer import Encoder, load_tokenizer, pad_id
from jaxlora.generation.chat import Read, Session, Write, chat
from jaxlora.generation.decoding import generate
from jaxlora.generation.layout import for_decoding
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.text import answer_text, end_ids
from jaxlora.models.config import ModelConfig
from jaxlora.models.task import LABEL, NEXT_TOKEN, task_of
from jaxlora.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Base weights with an adapter on top, bound to nothing yet; made by `load`."""

    transformer: Transformer
    params: Tree
    tokenizer: Any
    template: ChatTemplate | None
    eos_ids: tuple[int, ...] = ()

    def generate(
        self, prompts: Sequence[str], options: SamplingOptions | None = None, *, raw: bool = False
    ) -> list[str]:
        """Returns the answer to each prompt.

        Args:
          prompts: user messages, written into the chat template if the tokenizer has one.
          options: greedy by default.
          raw: continue the text as it is, without the chat template.
        """
        encoder = Encoder(self.tokenizer)
        template = None if raw else self.template
        ids = [
            prompt_ids([{"role": "user", "content": text}], encoder, template)
            if template
            else encoder.prefix + encoder.ids([text])[0]
            for text in prompts
        ]
        ends = end_ids(self.tokenizer, template, self.eos_ids)
        answers = generate(
            self.transformer,
            self.params,
            ids,
            options or SamplingOptions(),
            ends,
            pad_id(self.tokenizer),
        )
        return [
            answer_text(self.tokenizer, prompt, answer)
            for prompt, answer in zip(ids, answers, strict=True)
        ]

    def chat(
        self, options: SamplingOptions, read: Read, write: Write, *, system: str | None = None
    ) -> None:
        """Talks until the input ends; see `jaxlora.generation.chat`."""
        session = Session(
            self.transformer,
            self.params,
            self.tokenizer,
            options,
            self.template,
            system,
            self.eos_ids,
        )
        chat(session, read, write)


def locate(
    model: str | Path, adapter: str | Path | None, revision: str | None = None
) -> tuple[Path, Path | None]:
    """Returns the folders of base and adapter; a lone adapter folder names its own base.

    Raises:
      UserError: a folder or hub id that is not there.
    """
    if adapter is not None:
        return hub.resolve(model, revision), hub.resolve(adapter)
    folder = hub.resolve(model, revision)
    if not (folder / CONFIG_FILE).is_file():
        return folder, None
    written = read_json_object(folder / CONFIG_FILE, "expected an adapter folder")
    base = base_name(written)
    if not base:
        raise UserError(
            f"{folder}: its {CONFIG_FILE} names no base model; give base and --adapter."
        )
    return hub.resolve(base), folder


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model of which everything but the weights of the base has been read.

    Attributes:
      folder: of the base.
      stored, raw: what its config.json says, translated and as written.
      adapter: on top of it.
      quantization, dtype: how the base is stored.
    """

    folder: Path
    stored: ModelConfig
    raw: dict[str, Any]
    adapter: LoadedAdapter | None
    tokenizer: Any
    quantization: QuantSpec | None
    dtype: str

    @property
    def cfg(self) -> ModelConfig:
        """Shape of the model."""
        return self.stored if self.adapter is None else self.adapter.cfg

    @property
    def labels(self) -> tuple[str, ...]:
        """What the adapter calls its labels, if it is a classifier's and tells."""
        return self.adapter.labels if self.adapter else ()

    def load(self) -> Tree:
        """Returns the weights of the base with the adapter in place.

        Raises:
          UserError: as `load_base`.
        """
        params = load_base(
            self.folder,
            self.stored,
            self.cfg,
            dtype=self.dtype,
            quantization=self.quantization,
            trained=self.adapter.parts if self.adapter else (),
        )
        return params if self.adapter is None else self.adapter.on(params, self.dtype)


def open_model(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    quantization: QuantSpec | None = None,
    dtype: str | None = None,
) -> OpenedModel:
    """Finds a model and reads all but the weights of the base.

    Args:
      model, adapter, revision, quantization, dtype: as for `load`.

    Raises:
      UserError: anything missing, damaged or unfitting.
    """
    base, adapter_folder = locate(model, adapter, revision)
    stored, raw = read_model_config(base)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    made = None
    if adapter_folder is not None and quantization is None:
        quantization = trained_storage(adapter_folder)
    if adapter_folder is not None:  # read first: it is small, and refuses a wrong base early
        made = read_adapter(adapter_folder, stored, fingerprint=base_fingerprint(base))
    # A run saves the tokenizer beside its adapter, with the chat template it trained with.
    beside = adapter_folder or base
    tokenizer = load_tokenizer(beside if (beside / "tokenizer.json").is_file() else base)
    return OpenedModel(base, stored, raw, made, tokenizer, quantization, dtype)


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    quantization: QuantSpec | None = None,
    dtype: str | None = None,
) -> LanguageModel:
    """Loads a model to generate with.

    Args:
      model: folder or hub id of a model, or of an adapter that names its base.
      adapter: folder or hub id of a PEFT adapter to put on top.
      revision: branch, tag or commit of a hub model.
      quantization: how to store the base; None: as it was while the adapter was trained, where
        the adapter tells (jaxlora's do), else plain.
      dtype: of activations and plain weights; default float32 on a CPU, bfloat16 elsewhere.

    Raises:
      UserError: anything missing, damaged or unfitting.
    """
    opened = open_model(model, adapter, revision=revision, quantization=quantization, dtype=dtype)
    cfg, tokenizer, task = opened.cfg, opened.tokenizer, task_of(opened.cfg)
    if task != NEXT_TOKEN:
        use = "classify" if task == LABEL else "evaluate"
        raise UserError(
            f"{adapter or model}: {cfg.family} does not write text (it is for {task.pipeline}); "
            f"use jaxlora {use}."
        )
    params = for_decoding(opened.load(), cfg)
    template = template_of(tokenizer) if tokenizer.chat_template else None
    transformer = Transformer(cfg, dtype=opened.dtype)
    return LanguageModel(transformer, params, tokenizer, template, _eos_ids(opened.folder))


def _eos_ids(folder: Path) -> tuple[int, ...]:
    """End tokens of generation_config.json: instruct models list more than their tokenizer's."""
    path = folder / "generation_config.json"
    ids = read_json_object(path, "").get("eos_token_id") if path.is_file() else None
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)
