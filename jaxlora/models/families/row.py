"""What a row of the table of families says, and the words its columns are written with."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Any]
Names = Mapping[str, str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """What the fields of one architecture's config.json mean, and what its tensors are called.

    Attributes:
      fields: fields of config.json that are read, with what Hugging Face assumes where the file is
        silent.
      config: fields of `ModelConfig` that differ from LLaMA's: a value, or a function that computes
        it from the file's fields.
      names: Hugging Face's name of every module (of a leaf, where it is not ``weight`` or
        ``bias``), by our path without the leaf; ``{layer}`` stands for the layer number.
      expected: fields of which only the listed values are handled.
      ignored: fields that do not change what the model computes.
      prefix: what tensor names begin with in a file saved with the head, and not in one saved
        without (GPT-2's own repository).
      buffers: endings of tensors in a file that follow from config.json, or belong to heads of
        pre-training that the model does not have.
      older: ``(ending, older ending)`` of tensors that some files have under another name.
    """

    fields: Fields
    config: Mapping[str, Any | Callable[[Fields], Any]]
    names: Names
    expected: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    prefix: str = "model."
    buffers: tuple[str, ...] = ()
    older: tuple[tuple[str, str], ...] = ()

    def but(
        self,
        *,
        fields: Fields | None = None,
        without: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
        names: Names | None = None,
        **changes: Any,
    ) -> "Family":
        """Returns a row with more or other entries, `without` some of the fields."""
        merged = {**self.fields, **(fields or {})}
        return dataclasses.replace(
            self,
            fields={name: value for name, value in merged.items() if name not in without},
            config={**self.config, **(config or {})},
            names={**self.names, **(names or {})},
            **changes,
        )


def field(name: str) -> Callable[[Fields], Any]:
    """Returns the function that reads one field."""
    return lambda fields: fields[name]


# What nearly every config.json calls alike.
SIZES = {
    "vocab_size": field("vocab_size"),
    "embed_dim": field("hidden_size"),
    "mlp_dim": field("intermediate_size"),
    "num_layers": field("num_hidden_layers"),
    "num_heads": field("num_attention_heads"),
    "max_context": field("max_position_embeddings"),
    "tie_embedding": field("tie_word_embeddings"),
    "init_std": field("initializer_range"),
}


def head_tensor_of(row: Family) -> str:
    """Returns the name in a checkpoint of the head's weight."""
    name = row.names.get("lm_head/kernel", f"{row.names['lm_head']}.weight")
    assert isinstance(name, str), name
    return name


def layer_names(prefix: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Returns names of a layer's modules below `prefix`.

    >>> layer_names("model.layers.{layer}", {"mlp/up_proj": "mlp.up_proj"})
    {'layers/mlp/up_proj': 'model.layers.{layer}.mlp.up_proj'}
    """
    return {f"layers/{ours}": f"{prefix}.{theirs}" for ours, theirs in modules.items()}


def layers_of_type(name: str, default: Callable[[Fields], list[str]]) -> Callable[[Fields], Any]:
    """Returns the function that lists the layers of one of `layer_types`' types."""

    def layers(fields: Fields) -> tuple[int, ...]:
        types = fields["layer_types"] or default(fields)
        return tuple(number for number, kind in enumerate(types) if kind == name)

    return layers
