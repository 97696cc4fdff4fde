"""Model families as data: one row of differences each. See `row.Family` and docs."""

from jaxlora.models.families import (
    classifiers,
    deepseek,
    encoders,
    experts,
    gemma,
    glm,
    gpt,
    layernorm,
    llama,
)
from jaxlora.models.families.row import Family

_DECODERS: dict[str, Family] = {
    **llama.ROWS,
    **glm.ROWS,
    **gemma.ROWS,
    **experts.ROWS,
    **deepseek.ROWS,
    **layernorm.ROWS,
    **gpt.ROWS,
}
FAMILIES: dict[str, Family] = {**_DECODERS, **encoders.ROWS, **classifiers.rows(_DECODERS)}
CLASSIFIERS: dict[str, str] = classifiers.names([*_DECODERS, *encoders.ROWS])
"""Architecture: that of its classifier."""
