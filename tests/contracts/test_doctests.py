"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import jaxlora

# Not installed by a plain `pip install jaxlora`; a module that needs one of them is skipped.
OPTIONAL = {"torch", "peft", "wandb", "tensorboardX", "bitsandbytes", "nbformat", "nbclient"}
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def module_names() -> Iterator[str]:
    for module in pkgutil.walk_packages(jaxlora.__path__, "jaxlora."):
        if not module.name.endswith("__main__"):
            yield module.name


@pytest.mark.parametrize("name", module_names())
def test_examples_run(name, tmp_path, monkeypatch):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OPTIONAL:
            pytest.skip(f"{error.name} is not installed")
        raise
    monkeypatch.chdir(tmp_path)  # an example that writes files writes them here
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name}"


def test_examples_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(f"jaxlora.{name}") for name in ("core.tree", "lora.wrap")]
    assert all(any(test.examples for test in finder.find(module)) for module in modules)
