"""No file of the package is a copy of another with changes."""

import ast
import itertools
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "jaxlora"
LARGEST_SHARE = 0.5
# Below this many lines, imports alone make files alike.
SMALLEST_FILE = 15


def code_lines(path):
    """Returns the file's lines of code, less comments, docstrings, imports and `__all__`."""
    text = path.read_text()
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_text or is_list or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = (line.strip() for n, line in enumerate(text.splitlines(), 1) if n not in skipped)
    return Counter(line for line in lines if line and line[0] not in "#)]}")


def share(one, other):
    """Returns the share of the shorter file's lines that the other has too."""
    return (one & other).total() / min(one.total(), other.total())


def test_no_two_files_share_half_their_lines():
    files = {path: code_lines(path) for path in sorted(PACKAGE.rglob("*.py"))}
    files = {path: lines for path, lines in files.items() if lines.total() >= SMALLEST_FILE}
    assert len(files) > 10
    copies = {
        f"{one.relative_to(PACKAGE)} and {other.relative_to(PACKAGE)}": round(portion, 2)
        for (one, lines), (other, others) in itertools.combinations(files.items(), 2)
        if (portion := share(lines, others)) > LARGEST_SHARE
    }
    assert not copies


def test_a_copy_with_changes_would_be_noticed(tmp_path):
    original = (PACKAGE / "ops" / "rope.py").read_text()
    lines = original.splitlines()
    copy = tmp_path / "copy.py"
    copy.write_text("\n".join(line.replace("frequencies", "angles") for line in lines))
    assert share(code_lines(PACKAGE / "ops" / "rope.py"), code_lines(copy)) > LARGEST_SHARE
