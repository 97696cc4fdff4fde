"""docs/families.md has a row for every family, README a link to it."""

from pathlib import Path

from jaxlora.models.families import FAMILIES

ROOT = Path(__file__).parents[2]


def rows() -> list[str]:
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    return cells[2:]  # below header and rule


def test_the_page_lists_exactly_the_families():
    assert rows() == list(FAMILIES)


def test_readme_links_to_the_page():
    assert "(docs/families.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_released_models_are_named_for_exactly_the_families():
    from released_models import RELEASED

    assert set(RELEASED) == set(FAMILIES)
