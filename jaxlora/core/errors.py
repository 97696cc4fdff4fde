"""The one error type for a mistake the user can mend, and spelling suggestions."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend, in one line: what, where, what was expected, what to do.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``' Did you mean "x"?'`` for the known word nearest to `word`, else ``''``.

    >>> did_you_mean("lora_rank", ["lora_r", "seed"])
    ' Did you mean "lora_r"?'
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
