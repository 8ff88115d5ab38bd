"""The notebook docs/quickstart.ipynb: short, without stored outputs, and it runs from its first cell to its last."""

import json
import re
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def test_it_is_short_and_stores_no_outputs():
    assert len(CELLS) <= 15
    assert all(len(cell["source"]) <= 20 for cell in CELLS)
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.parametrize("folder", [".", "docs"])
def test_it_runs(folder, monkeypatch, capsys):
    """From the repository, and from the notebook's own folder as Jupyter does; as a kernel, in one namespace."""
    for package in ("scipy", "safetensors"):
        pytest.importorskip(package)
    matplotlib.use("agg", force=True)
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict = {}
    for number, source in enumerate(CODE):
        exec(compile(source, f"cell {number}", "exec"), names)
    names["plt"].close("all")
    assert names["counts"].sum() > 0
    assert names["counts"].tolist() == names["events"].tolist()
    assert names["counts"].argmax() == 1
    assert abs(names["connectivity"] - 0.1) < 0.01
    assert names["accuracy"] > 0.8
    assert "connectivity 0.1" in capsys.readouterr().out
