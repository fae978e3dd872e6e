"""The notebooks run from top to bottom, and are committed without what they print."""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.assets import AssetMissing
from benchmarks.embedded import wikileads

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "reports" / "notebooks").glob("*.ipynb"))
SHOWN = {"widths_and_experts": "image/png", "compare_two_runs": "Verdict", "add_a_method": "first-blocks"}


def outputs(path: Path, model: str = "tiny-llama") -> list[Any]:
    """What the cells of a notebook show when it is run in its own folder, on this model where it asks for one."""
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks: pip install '.[notebooks]'")
    client = pytest.importorskip("nbclient", reason="needs the extra notebooks: pip install '.[notebooks]'")
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace('MODEL = "tiny-llama"', f'MODEL = "{model}"')
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    runner = client.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    runner.execute(env=environment)
    return [output for cell in book.cells for output in cell.get("outputs", [])]


def test_there_is_a_notebook_for_each_purpose() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_output(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks: pip install '.[notebooks]'")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_is_for(path: Path) -> None:
    try:
        next(wikileads.articles("test"))
    except AssetMissing as error:
        pytest.skip(str(error))
    shown = outputs(path)
    texts = [str(output.get("data", output.get("text", ""))) for output in shown]
    assert any(SHOWN[path.stem] in text for text in texts)
    assert not any(output.get("name") == "stderr" and "Warning" in output.text for output in shown)


def test_without_tomoe_a_notebook_says_what_makes_its_figures() -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem == "widths_and_experts")
    text = "".join(output.get("text", "") for output in outputs(path, "smollm2-135m-q4"))
    (line,) = {line for line in text.splitlines() if line.startswith("Width of each layer: ")}
    assert "structure.json" in line and "--models smollm2-135m-q4" in line and "--methods tomoe" in line
