"""Who may import whom, and how large files and functions may grow."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "jaxlora").rglob("*.py"))
# Costly or optional: imported inside the function that needs them.
HEAVY = {
    *("transformers", "datasets", "torch", "peft", "bitsandbytes"),
    *("matplotlib", "wandb", "tensorboardX", "orbax", "pandas", "sentencepiece", "gguf", "fsspec"),
}
FILE_LINES, FUNCTION_LINES = 300, 50


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(nodes):
    """Yields the first word of every imported module among `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_files_import_only_from_lower_floors():
    command = Path(sys.executable).parent / "lint-imports"
    command = command if command.exists() else shutil.which("lint-imports")
    if not command:
        pytest.skip("import-linter is in the dev extra")
    result = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_flax_is_imported_by_models_only():
    users = {
        path.relative_to(ROOT / "jaxlora").parts[0]
        for path in FILES
        if "flax" in imported(ast.walk(ast.parse(path.read_text())))
    }
    assert users == {"models"}


def test_heavy_packages_are_imported_where_they_are_needed():
    for path in FILES:
        at_top = set(imported(ast.parse(path.read_text()).body))
        assert not at_top & HEAVY, f"{name_of(path)} imports {at_top & HEAVY} at its top"


def test_importing_jaxlora_loads_no_heavy_package():
    program = "import sys, jaxlora; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not set(run.stdout.split()) & HEAVY


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert not [name_of(path) for path in FILES if drawers & set(path.with_suffix("").parts)]


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    too_long = {name: lines for name, lines in lengths.items() if lines > FILE_LINES}
    assert not too_long, f"more than {FILE_LINES} lines: {too_long}"


def test_functions_are_short():
    too_long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1 - docstring_lines(node)
                if lines > FUNCTION_LINES:
                    too_long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    assert not too_long, f"more than {FUNCTION_LINES} lines without docstring: {too_long}"


def docstring_lines(function):
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return 0
    return first.end_lineno - first.lineno + 1


def test_files_are_ascii():
    assert not [name_of(path) for path in FILES if not path.read_bytes().isascii()]


def test_every_package_says_what_it_is():
    silent = [name_of(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"without a module docstring: {silent}"
