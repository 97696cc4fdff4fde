"""The JSON side files of a model or adapter folder."""

import json
from pathlib import Path
from typing import Any

from jaxlora.core.errors import UserError


def read_json_object(path: Path, missing: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
      path: the file.
      missing: what to say if it is not there, after "not found; ".

    Raises:
      UserError: no such file, not JSON, or JSON that is no object.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; {missing}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content
