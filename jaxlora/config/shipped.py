"""The example configurations that come with jaxlora."""

from pathlib import Path

from jaxlora.core.errors import UserError

_PACKAGE = Path(__file__).parents[1]
# How a file in configs/ of the project finds the embedded model and data.
_ASSETS = "../jaxlora/assets"


def folder() -> Path:
    """Returns where they are: in an installed package, or beside it in a clone of the project.

    Raises:
      UserError: an installation without them.
    """
    for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (place / "quickstart.yml").is_file():
            return place
    raise UserError("fetch: this installation has no example configurations; install it again")


def copy_configs(target: str) -> list[Path]:
    """Copies them into a folder and returns the new files.

    Raises:
      UserError: a file of that name is there already; then nothing is written.
    """
    sources = sorted(path for path in folder().iterdir() if path.suffix in (".yml", ".py"))
    written = [Path(target) / path.name for path in sources]
    for path in written:
        if path.exists():
            raise UserError(f"{path}: is already there; choose another folder with --to")
    try:
        Path(target).mkdir(parents=True, exist_ok=True)
        for source, path in zip(sources, written, strict=True):
            text = source.read_text(encoding="utf-8").replace(_ASSETS, str(_PACKAGE / "assets"))
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from None
    return written
