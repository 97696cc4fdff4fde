"""docs/python-api.md says what the package offers, and its examples run."""

import importlib.util
import re
from pathlib import Path

import jaxlora

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"
FENCE = re.compile(r"^```python(?P<needs>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> list[tuple[int, str, str]]:
    """Line number, what stands after ``python`` in the fence, and code of each example."""
    text = PAGE.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("code")), found["needs"].strip(), found["code"])
        for found in FENCE.finditer(text)
    ]


def test_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch = importlib.util.find_spec("torch") and importlib.util.find_spec("peft")
    names: dict = {}
    for line, needs, code in snippets():
        assert needs in ("", "verify"), f"line {line}: {needs}"
        if needs == "verify" and not torch:
            continue
        # The line number makes a failure point into the page.
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)
    assert (tmp_path / "outputs" / "first-merged" / "model.safetensors").is_file()


def test_every_example_is_found():
    assert len(snippets()) == PAGE.read_text(encoding="utf-8").count("```python") >= 10


def test_every_public_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    names = [name for name in jaxlora.__all__ if not name.startswith("__")]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
