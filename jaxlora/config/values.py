"""What a key may hold: number ranges, text, and the strict base of every section."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    # Python's bool is an int; "2e-5" in quotes is text that pydantic reads as a float.
    if isinstance(value, bool):
        raise PydanticCustomError("bool_for_number", "a number was expected")
    return value


def _text(value: Any) -> Any:
    # `wandb_name: 7` can only mean "7"; a float is left to fail, since 1.10 has become 1.1.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _digits(value: Any) -> Any:
    # JSON knows no keys but text.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _strategy(value: Any) -> Any:
    # YAML 1.1 reads an unquoted no as false.
    return "no" if value is False else value


def _kernel(value: Any) -> Any:
    # Axolotl's names of kernels on the hub, such as kernels-community/vllm-flash-attn3.
    return "auto" if isinstance(value, str) and value.startswith("kernels-community/") else value


Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0, le=1_000_000_000)]
NotNegative = Annotated[Number, Field(ge=0, le=1_000_000_000)]
Share = Annotated[Number, Field(ge=0, le=1)]
OpenShare = Annotated[Number, Field(ge=0, lt=1)]
Implementation = Annotated[
    Literal[
        "auto", "reference", "chunked", "cudnn", "splash", "eager", "sdpa", "flash_attention_2",
        "flash_attention_3", "flex_attention", "xformers", "sage", "fp8",
    ],
    BeforeValidator(_kernel),
]  # fmt: skip
Strategy = Annotated[Literal["steps", "epoch", "no"], BeforeValidator(_strategy)]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[Whole, Field(ge=1, le=100_000_000)]
Natural = Annotated[Whole, Field(ge=0, le=100_000_000)]
TokenId = Annotated[Natural, BeforeValidator(_digits)]
Size = Annotated[Whole, Field(ge=1, le=1_000_000)]


class Section(BaseModel):
    """A mapping of the file: frozen, no unknown key, and a null key means its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        known = cls.model_fields
        return {key: value for key, value in raw.items() if value is not None or key not in known}
