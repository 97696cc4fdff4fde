"""The environment variables of jaxlora: a misspelt one would be ignored in silence."""

from collections.abc import Mapping

from jaxlora.core.errors import UserError, did_you_mean

VARIABLES: Mapping[str, str] = {
    "JAXLORA_CACHE": "folder of what is kept between runs; ~/.cache/jaxlora otherwise",
    "JAXLORA_TOPOLOGY": "hardware that `jaxlora plan` plans for, where --topology is not given",
    "JAXLORA_NOTEBOOK_TINY": "1: the notebooks run on the embedded model (their tests)",
}
"""Name: what it says."""


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses variables that begin like ours and are not.

    >>> check_environment({"JAXLORA_CACHE": "/tmp", "HOME": "/root"})

    Raises:
      UserError: naming the variable, with a suggestion.
    """
    for name in sorted(environment):
        if name.startswith("JAXLORA_") and name not in VARIABLES:
            raise UserError(
                f"environment: {name} is no variable of jaxlora ({', '.join(VARIABLES)}); unset "
                f"it.{did_you_mean(name, VARIABLES)}"
            )
