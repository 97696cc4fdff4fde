"""Model families as data: one row of differences each. See `row.Family` and docs."""

from jaxlora.models.families import gemma, gpt, layernorm, llama
from jaxlora.models.families.row import Family

FAMILIES: dict[str, Family] = {**llama.ROWS, **gemma.ROWS, **layernorm.ROWS, **gpt.ROWS}
