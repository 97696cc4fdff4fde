import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import jaxlora.config
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


@pytest.mark.parametrize(
    "name", [each.name for each in pkgutil.iter_modules(jaxlora.config.__path__)]
)
def test_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(f"jaxlora.config.{name}")).failed == 0
