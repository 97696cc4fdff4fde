"""docs/families.md has a row for every family, README a link to it."""

from pathlib import Path

from jaxlora.models.families import FAMILIES

ROOT = Path(__file__).parents[2]


# Classifiers are listed below the table.
CLASSIFIERS = [family for family in FAMILIES if "SequenceClassification" in family]
ROWS = [family for family in FAMILIES if family not in CLASSIFIERS]


def page() -> str:
    return (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def rows() -> list[str]:
    cells = [line.split("|")[1].strip() for line in page().splitlines() if line.startswith("|")]
    return cells[2:]  # below header and rule


def test_the_page_lists_exactly_the_families():
    assert rows() == ROWS
    assert [
        line[2:] for line in page().splitlines() if line.startswith("- ") and "*" not in line
    ] == CLASSIFIERS


def test_readme_links_to_the_page():
    assert "(docs/families.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_released_models_are_named_for_exactly_the_families():
    from released_models import RELEASED

    assert set(RELEASED) == set(ROWS)
