"""The benchmark of MiSTER-E runs wherever JAX does, and says what it measured."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import BenchmarkConfig, benchmark
from benchmarks.flops import model_flops
from mister_jax.errors import InputError
from tests.benchmarks.conftest import TINY

ROOT = pathlib.Path(__file__).parents[2]

# Runs the command as on a machine with little more than JAX.
BARE = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "ml_collections", "matplotlib", "torch",
             "tensorboardX", "safetensors", "transformers", "huggingface_hub"):
    sys.modules[name] = None
import functools, runpy
import benchmarks
from mister_jax import MisterEConfig
benchmarks.PRESETS["tiny"] = functools.partial(
    MisterEConfig, context_dim=4, gru_layers=1, fusion_dim=4, fusion_layers=1,
    attention_dim=3,
)
sys.argv = ["benchmark", *sys.argv[1:]]
runpy.run_module("launch.benchmark", run_name="__main__")
"""


def run_command(*flags, code=None, **environment):
    start = ["-m", "launch.benchmark"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("backend, devices", [("jit", 2), ("pmap", 2)])
def test_steps_are_measured_on_every_backend(backend, devices):
    config = BenchmarkConfig(**TINY, backend=backend, devices=devices)
    (rows,) = benchmark(config).sections.values()
    assert [row["what"] for row in rows] == ["inference", "training step"]
    for row in rows:
        assert row["utterances"] == 12
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["utterances_per_second"] == pytest.approx(1e3 / row["ms_per_utterance"])
        assert row["peak_share"] == pytest.approx(row["model_gflop"] / (row["median_ms"] / 1e3))


def test_an_epoch_is_bucketed_and_its_padding_told():
    report = benchmark(BenchmarkConfig(**TINY), lengths="few")
    ours, released = report.sections["epoch"]
    assert ours["utterances"] == released["utterances"] == 9
    assert ours["padding_share"] < released["padding_share"] < 1
    assert ours["median_ms"] > 0 and "median_ms" not in released


def test_parts_are_measured_forward_and_backward():
    rows = benchmark(BenchmarkConfig(**TINY), parts=True).sections["parts"]
    by_name = {row["what"]: row for row in rows}
    for name in model_flops(BenchmarkConfig(**TINY).model, 4, 3):
        assert by_name[name]["forward_ms"] > 0
    parts = [row for row in rows[:-2] if row["what"] != "one of its scans"]
    assert by_name["sum of the parts"]["ms"] == pytest.approx(sum(row["ms"] for row in parts))


def test_json_holds_every_row(tmp_path):
    report = benchmark(BenchmarkConfig(**TINY))
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["settings"]["preset"] == "tiny"
    assert written["environment"]["platform"] == "cpu"
    assert written["environment"]["matmul_peak_gflop_per_second"] == 1
    assert written["rows"] == [{"section": "steps", **row} for row in report.sections["steps"]]
    assert len(report.tables()) == 2
    with pytest.raises(InputError, match="cannot be written"):
        report.write(tmp_path / "no" / "report.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "huge"},
        {"dtype": "float8"},
        {"steps": 0},
        {"backend": "xmap"},
        {"precision": "low"},
    ],
)
def test_unknown_settings_are_refused(fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))} .*(allowed|at least)"):
        BenchmarkConfig(**fields)


@pytest.mark.parametrize(
    "fields, options, message",
    [
        ({"devices": 9}, {}, "devices 9; allowed are 1 to"),
        ({"devices": 2, "batch_size": 3}, {}, "batch_size 3; allowed are multiples of the 2"),
        ({"devices": 2}, {"parts": True}, "devices 2; the parts are measured on 1"),
        ({}, {"lengths": "novel"}, "lengths 'novel'; allowed are iemocap"),
        ({}, {"topologies": "v5e:2x2", "parts": True}, "goes with no"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, options, message):
    with pytest.raises(InputError, match=message):
        benchmark(BenchmarkConfig(**{**TINY, **fields}), **options)


def test_without_pytorch_the_comparison_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torch"):
        benchmark(BenchmarkConfig(**TINY), compare=True)


def test_the_command_needs_little_more_than_jax(tmp_path):
    sizes = ("--preset=tiny", "--speech_dim=4", "--text_dim=4", "--batch_size=1", "--length=2")
    path = tmp_path / "report.json"
    done = run_command(*sizes, "--steps=1", f"--json={path}", code=BARE)
    assert done.returncode == 0, done.stderr
    assert "training step" in done.stdout
    assert len(json.loads(path.read_text())["rows"]) == 2


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--preset=huge", "preset 'huge'; allowed are paper, small"),
        ("--encoder=llama_3_1_8b", "goes with one of --aot, --random, --throughput"),
    ],
)
def test_the_command_tells_errors_in_one_line(flag, message):
    done = run_command(flag)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and last.endswith(message)


@pytest.mark.parity
def test_pytorch_is_measured_beside_ours():
    pytest.importorskip("torch")
    report = benchmark(BenchmarkConfig(**TINY), compare=True)
    rows = report.sections["steps"]
    assert [row["library"] for row in rows] == ["mister_jax", "torch"] * 2
    for ours, torch in zip(rows[::2], rows[1::2], strict=True):
        assert ours["time_over_ours"] == 1
        assert torch["time_over_ours"] == pytest.approx(torch["median_ms"] / ours["median_ms"])
    epoch = benchmark(BenchmarkConfig(**TINY), lengths="few", compare=True)
    assert [row["median_ms"] > 0 for row in epoch.sections["epoch"]] == [True, True]


@pytest.mark.parity
@pytest.mark.parametrize("batch_size, status", [(4, 0), (2**20, 1)])
def test_the_exit_status_says_whether_a_step_fits_a_tpu(tmp_path, batch_size, status):
    pytest.importorskip("libtpu")
    path = tmp_path / "report.json"
    flags = ("--preset=small", "--aot=v5e:2x2", f"--batch_size={batch_size}", f"--json={path}")
    done = run_command(*flags)
    assert done.returncode == status, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["fits"] == (status == 0)
    assert "predicted" in done.stdout
