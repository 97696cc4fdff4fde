"""Model families as data: one row of differences each. See `row.Family` and docs."""

from jaxlora.models.families import deepseek, encoders, experts, gemma, gpt, layernorm, llama
from jaxlora.models.families.row import Family

FAMILIES: dict[str, Family] = {
    **llama.ROWS,
    **gemma.ROWS,
    **experts.ROWS,
    **deepseek.ROWS,
    **layernorm.ROWS,
    **gpt.ROWS,
    **encoders.ROWS,
}
