import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import jaxlora.config
from jaxlora.config.keys import DATASET_REFUSED, IMPLIED, MAPPED, NO_OP, REFUSED
from jaxlora.config.reference import markdown
from jaxlora.config.schema import SECTIONS, Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_what_the_schema_says():
    assert PAGE.read_text() == markdown(), "write docs/configuration.md again, as it says itself"


def test_every_key_is_on_the_page_with_a_meaning():
    for name in set(Config.model_fields) - {"foreign"}:
        assert f"| `{name}` | " in PAGE.read_text()
        assert Config.model_fields[name].description
    assert set(Config.model_fields) == {name for part in SECTIONS for name in part.model_fields}


def test_every_other_key_is_on_the_page_with_its_reason():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    reasons = {**NO_OP, **REFUSED, **{f"datasets[].{k}": v for k, v in DATASET_REFUSED.items()}}
    for key, reason in reasons.items():
        assert any(f"`{key}`" in row and f"| {reason} |" in row for row in rows), key
    for key in (*MAPPED, *IMPLIED):
        assert any(f"`{key}`" in row and "| read as " in row for row in rows), key


@pytest.mark.parametrize(
    "name", [each.name for each in pkgutil.iter_modules(jaxlora.config.__path__)]
)
def test_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(f"jaxlora.config.{name}")).failed == 0
