"""The notebooks run from top to bottom, the quickstart one with its full training."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import jaxlora

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
QUICKSTART, COLAB = NOTEBOOKS / "quickstart.ipynb", NOTEBOOKS / "colab_qlora.ipynb"


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: Path, folder: Path, timeout_s: int) -> nbformat.NotebookNode:
    """Runs every cell with `folder` as working directory; a cell that fails raises."""
    notebook = read(path)
    client = NotebookClient(
        notebook, timeout=timeout_s, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in outputs(notebook))


def plots(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory, with everything a kernel may write beside it in there too."""
    for name in ("JAXLORA_CACHE", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    # One device, as a notebook's user has on a CPU, whatever the other tests asked for.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder
    shutil.rmtree(tmp_path, ignore_errors=True)  # checkpoints; pytest would keep three runs


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id


def test_every_notebook_is_run_here():
    assert set(NOTEBOOKS.glob("*.ipynb")) == {QUICKSTART, COLAB}


def test_quickstart_dict_says_what_the_yaml_file_says(monkeypatch):
    cells = {cell.id: cell.source for cell in read(QUICKSTART).cells}
    assets = jaxlora.assets()
    names = {"assets": assets, "base": assets / "tiny-llama"}
    exec(cells["config"], names)
    assert names["recipe"].is_file()
    monkeypatch.chdir(names["recipe"].parent)
    from_dict = jaxlora.load_config(names["quickstart"], ["--output_dir=x"])
    from_file = jaxlora.load_config(names["recipe"], ["--output_dir=x"])
    assert absolute(from_dict.model_dump()) == absolute(from_file.model_dump())


def absolute(values):
    """Relative and absolute names of the same file count as equal."""
    if isinstance(values, dict):
        return {key: absolute(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [absolute(value) for value in values]
    exists = isinstance(values, str) and values and os.path.exists(values)
    return os.path.realpath(values) if exists else values


def test_quickstart_learns_its_task(workplace):
    notebook = execute(QUICKSTART, workplace, timeout_s=1500)
    run = only(workplace / "outputs", "quickstart-*[0-9]")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    scores = [line["exact_match"] for line in map(json.loads, lines) if "exact_match" in line]
    before, after = scores[0], scores[-1]
    assert len(scores) == 2
    assert before <= 0.05
    assert after >= 0.9
    assert f"{before:.1%} -> {after:.1%}" in printed(notebook)
    assert "(exactly as expected)" in printed(notebook)
    assert plots(notebook) == 2
    assert (run / "adapter_config.json").is_file()
    assert (run / "adapter_model.safetensors").is_file()


def test_colab_notebook_runs_on_the_tiny_base(workplace, monkeypatch):
    monkeypatch.setenv("JAXLORA_NOTEBOOK_TINY", "1")
    notebook = execute(COLAB, workplace, timeout_s=600)
    folder = only(workplace / "outputs", "*-adapter")
    written = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written
    assert "checkpoints" not in written
    assert only(workplace / "outputs", "*-adapter.zip").stat().st_size > 0
    assert (only(workplace / "outputs", "*-merged") / "model.safetensors").is_file()
    assert "equal: True" in printed(notebook)
    assert plots(notebook) == 1


def test_colab_notebook_is_for_a_real_model_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("JAXLORA_NOTEBOOK_TINY", raising=False)
    first = next(cell for cell in read(COLAB).cells if cell.cell_type == "code")
    names: dict = {}
    exec(first.source, names)
    assert names["BASE"] == "mistralai/Mistral-7B-v0.3"
    assert names["TINY"] is False
