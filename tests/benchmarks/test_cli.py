"""The benchmark of MiSTER-E measures steps, epochs and parts, and reports the results."""

import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks.cli import measure_fusion
from benchmarks.config import BenchmarkConfig
from benchmarks.report import Report, environment
from mister_jax.errors import InputError
from tests.benchmarks.conftest import TINY
from tests.helpers.commands import run_commands

ROOT = pathlib.Path(__file__).parents[2]

# Runs the command on a tiny model and fails if a library that takes seconds to import is loaded.
CHECK_HEAVY_LIBRARIES = """
import functools, sys
from absl import app
from benchmarks import config
from mister_jax import MisterEConfig
config.PRESETS["tiny"] = functools.partial(
    MisterEConfig, context_dim=4, gru_layers=1, fusion_dim=4, fusion_layers=1, attention_dim=3
)
from benchmarks import cli

def main(_):
    cli.main()
    heavy = {"tensorflow", "tensorflow_datasets", "matplotlib", "torch"}
    sys.exit(f"loaded {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)

app.run(main)
"""


def run_command(*flags, code=None):
    command = ["-m", "launch.benchmark"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *command, *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("backend", "devices"), [("jit", 2), ("pmap", 2)])
def test_steps_are_measured_on_every_backend(backend, devices):
    config = BenchmarkConfig(**TINY, backend=backend, devices=devices)
    (rows,) = measure_fusion(config).values()
    assert [row["what"] for row in rows] == ["inference", "training step"]
    for row in rows:
        assert row["utterances"] == 12
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["utterances_per_second"] == pytest.approx(1e3 / row["ms_per_utterance"])
        assert row["peak_share"] == pytest.approx(row["model_gflop"] / (row["median_ms"] / 1e3))


def test_epoch_reports_padding_of_both_ways_to_batch():
    sections = measure_fusion(BenchmarkConfig(**TINY), lengths="few")
    bucketed, released = sections["epoch"]
    assert bucketed["utterances"] == released["utterances"] == 9
    assert bucketed["padding_share"] < released["padding_share"] < 1
    assert bucketed["median_ms"] > 0 and "median_ms" not in released


def test_parts_are_measured_alone():
    rows = measure_fusion(BenchmarkConfig(**TINY), parts_alone=True)["parts"]
    *parts, step, total = rows
    assert (step["what"], total["what"]) == ("training step", "sum of the parts")
    assert {part["what"] for part in parts} == {
        "convolutions",
        "GRU",
        "skips, classifiers",
        "cross-modal expert",
        "gate, losses",
        "optimizer",
    }
    assert all(part["ms"] > 0 for part in parts)
    assert total["ms"] == pytest.approx(sum(part["ms"] for part in parts))


def test_parts_add_up_to_the_flops_of_the_step():
    config = BenchmarkConfig(**TINY)
    sections = measure_fusion(config, parts_alone=True) | measure_fusion(config)
    parts = sum(row.get("model_gflop", 0) for row in sections["parts"])
    _, step = sections["steps"]
    assert parts == pytest.approx(step["model_gflop"], rel=1e-3)


def test_json_contains_every_row(tmp_path):
    sections = measure_fusion(BenchmarkConfig(**TINY))
    report = Report({"preset": "tiny", "aot": None}, environment(), sections)
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["settings"] == {"preset": "tiny", "aot": None}
    assert written["environment"]["platform"] == "cpu"
    assert written["rows"] == [{"section": "steps", **row} for row in sections["steps"]]
    assert {row["matmul_peak_gflop_per_second"] for row in written["rows"]} == {1}
    assert len(report.tables(width=200)) == 2
    with pytest.raises(InputError, match="cannot be written"):
        report.write(tmp_path / "no" / "report.json")


def test_wide_tables_are_divided_into_tables_that_fit():
    rows = [{"library": f"library {index}", "tokens_per_second": index} for index in range(9)]
    rows = [{**row, "median_s": 0.5, **dict.fromkeys("abcdefgh", 1)} for row in rows]
    console = Console(width=60, file=io.StringIO())
    tables = Report({}, environment(), {"extraction": rows}).tables(console.width)[1:]
    for table in tables:
        console.print(table)
    text = console.file.getvalue()
    assert len(tables) > 1 and "…" not in text
    for index in range(9):
        assert f"library {index}" in text
    assert text.count("tokens per second") == len(tables)


def test_a_single_field_is_shown():
    (table,) = Report({}, environment(), {"steps": [{"name": "one"}]}).tables(width=80)[1:]
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert "one" in console.file.getvalue()


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"devices": 9}, {}, "--devices=9; allowed: 1 to"),
        ({"devices": 2, "batch_size": 3}, {}, "--batch_size=3; allowed: multiples of the 2"),
        ({"devices": 2}, {"parts_alone": True}, "--devices=2; --parts allows 1"),
        ({}, {"topologies": "v5e:2x2", "parts_alone": True}, "--aot=v5e:2x2 excludes"),
    ],
)
def test_contradictory_options_are_refused(fields, options, message):
    with pytest.raises(InputError, match=message):
        measure_fusion(BenchmarkConfig(**{**TINY, **fields}), **options)


def test_missing_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torch"):
        measure_fusion(BenchmarkConfig(**TINY), compare=True)


def test_steps_import_no_heavy_libraries(tmp_path):
    sizes = ("--preset=tiny", "--speech_dim=4", "--text_dim=4", "--batch_size=1", "--length=2")
    path = tmp_path / "report.json"
    result = run_command(*sizes, "--steps=1", f"--json={path}", code=CHECK_HEAVY_LIBRARIES)
    assert result.returncode == 0, result.stderr
    assert "training step" in result.stdout
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 2
    assert written["settings"]["preset"] == "tiny"


INVALID_FLAGS = {
    "--preset=huge": "value should be one of <paper|small>",
    "--dtype=float8": "value should be one of <float32|bfloat16>",
    "--backend=xmap": "value should be one of <jit|pmap>",
    "--lengths=novel": "value should be one of <iemocap>",
    "--steps=0": "0 is not a positive integer",
    "--encoder=llama_3_1_8b": "needs one of --aot, --random, --throughput",
    "--onnx": "--onnx needs --encoder=FOLDER --throughput",
    "--data_dir=data": "--data_dir=data needs --training or --set",
    "--num_seeds=3": "--num_seeds needs --set=DATASET@FOLDS",
    "--set=tiny@dialogue:5": "--set needs --workdir=DIR",
    "--recording=a.wav": "--recording=a.wav needs --model=RUN",
    "--repeat=2": "--repeat=2 needs --recording=FILE",
    "--training=mosi_features,paper": "allowed: the name of a dataset, without variants",
}


@pytest.fixture(scope="module")
def invalid_flag_results(tmp_path_factory):
    """The result of the command with each invalid flag."""
    commands = [f"launch.benchmark {flag}" for flag in INVALID_FLAGS]
    results = run_commands(commands, tmp_path_factory.mktemp("commands"))
    return dict(zip(INVALID_FLAGS, results, strict=True))


@pytest.mark.parametrize(("flag", "message"), INVALID_FLAGS.items())
def test_invalid_flags_exit_with_a_one_line_error(invalid_flag_results, flag, message):
    result = invalid_flag_results[flag]
    assert result.status == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


@pytest.mark.parity
def test_pytorch_is_compared():
    pytest.importorskip("torch")
    rows = measure_fusion(BenchmarkConfig(**TINY), compare=True)["steps"]
    assert [row["library"] for row in rows] == ["mister_jax", "torch"] * 2
    for jax_row, torch_row in zip(rows[::2], rows[1::2], strict=True):
        assert jax_row["relative_time"] == 1
        assert torch_row["relative_time"] == pytest.approx(
            torch_row["median_ms"] / jax_row["median_ms"]
        )
    rows = measure_fusion(BenchmarkConfig(**TINY), lengths="few", compare=True)["epoch"]
    assert [row["median_ms"] > 0 for row in rows] == [True, True]


@pytest.mark.parity
@pytest.mark.parametrize(("batch_size", "status"), [(4, 0), (2**20, 1)])
def test_exit_status_says_whether_a_step_fits_a_tpu(tmp_path, batch_size, status):
    pytest.importorskip("libtpu")
    path = tmp_path / "report.json"
    flags = ("--preset=small", "--aot=v5e:2x2", f"--batch_size={batch_size}", f"--json={path}")
    result = run_command(*flags)
    assert result.returncode == status, result.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["fits"] == (status == 0)
    assert "predicted" in result.stdout
