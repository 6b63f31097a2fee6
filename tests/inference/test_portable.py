"""MiSTER-E as a StableHLO program that needs only JAX."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mister_jax import data
from mister_jax.calibration import Calibration, write_calibration
from mister_jax.errors import InputError
from mister_jax.inference.portable import PROGRAM_FILE, export_program
from mister_jax.predictor import Predictor
from tests.helpers.training import ALL_LAYERS, write_untrained_workdir

# This script runs the program while mister_jax, Flax and Optax cannot be imported.
RUN_PROGRAM = """
import json, pathlib, sys

class OnlyJax:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "optax", "mister_jax", "ml_collections", "etils"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, OnlyJax())
import numpy as np
from jax import export

folder = pathlib.Path(sys.argv[1])
names = json.loads((folder / "config.json").read_text())["inputs"]
program = export.deserialize((folder / "model.stablehlo").read_bytes())
inputs = np.load(sys.argv[2])
for size in inputs["sizes"]:
    batch = [inputs[name][:, :size] for name in names]
    output = program.call(*batch)
    np.savez(f"{sys.argv[2]}.{size}.npz", **output)
"""


@pytest.mark.parametrize(("num_seeds", "changes"), [(1, {"crf": True}), (2, {})])
def test_a_program_equals_the_predictor_where_only_jax_is_installed(
    calls_dir, tmp_path, num_seeds, changes
):
    run = write_untrained_workdir(
        tmp_path / "run", calls_dir, "both", num_seeds=num_seeds, **ALL_LAYERS, **changes
    )
    if num_seeds == 2:
        write_calibration(run, Calibration(0.5, (0.2, -0.2)), Predictor(run).progress)
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / PROGRAM_FILE).touch()
    export_program(run, tmp_path / "program", overwrite=True)
    with pytest.raises(InputError, match="program: a StableHLO program, which JAX runs without"):
        Predictor(tmp_path / "program")
    config = json.loads((tmp_path / "program" / "config.json").read_text())
    assert config["class_names"] == ["angry", "calm"]
    assert config["inputs"]["mask"] == "bool[batch, length]"
    features = data.load_features("both", "test", calls_dir)
    predictor = Predictor(run)
    split = predictor.task.batched(features, num_shards=1)
    batch = next(
        batch for batch in split.batches() if batch["mask"].shape[1] == max(features.lengths)
    )
    lengths = batch["mask"].sum(1)
    path = tmp_path / "inputs.npz"
    np.savez(path, sizes=[lengths.max(), 1], **{name: batch[name] for name in config["inputs"]})
    subprocess.run(
        [sys.executable, "-c", RUN_PROGRAM, str(tmp_path / "program"), str(path)], check=True
    )
    with np.load(f"{path}.{lengths.max()}.npz") as file:
        output = dict(file)
    expected = predictor(features)
    for row, length in zip(batch["row"], lengths, strict=True):
        start = features.offsets[row]
        for name, values in expected.items():
            np.testing.assert_allclose(
                output[name][list(batch["row"]).index(row), :length],
                values[start : start + length],
                atol=1e-5,
            )
    with np.load(f"{path}.1.npz") as file:
        assert file["probabilities"].shape[1] == 1


def test_a_program_is_not_written_over_other_files(workdir, tmp_path):
    with pytest.raises(InputError, match="exists; allowed: another --output, or --overwrite"):
        export_program(workdir, tmp_path)
    with pytest.raises(InputError, match=r"no model.stablehlo; --overwrite only replaces a"):
        export_program(workdir, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="no such folder"):
        export_program(tmp_path / "nothing", tmp_path / "program")
    assert not list(tmp_path.iterdir())
