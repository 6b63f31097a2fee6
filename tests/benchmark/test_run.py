"""The benchmark runs wherever JAX does, says what it measured, and counts right."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax import MisterE, MisterEConfig, benchmark
from mister_jax.benchmark import BenchmarkConfig
from mister_jax.errors import InputError
from mister_jax.optim import OptimizerConfig, optimizer
from mister_jax.steps import initial_state, mister_e_loss, train_step

ROOT = pathlib.Path(__file__).parents[1]
TINY = {"preset": "tiny", "speech_dim": 6, "text_dim": 5, "batch_size": 4, "length": 3, "steps": 2}

# Runs the command as on a machine with little more than JAX.
BARE = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "ml_collections", "matplotlib", "torch",
             "tensorboardX", "safetensors", "transformers"):
    sys.modules[name] = None
import functools, runpy
from mister_jax import MisterEConfig, benchmark
benchmark.PRESETS["tiny"] = functools.partial(
    MisterEConfig, context_width=4, gru_layers=1, fusion_width=4, fusion_layers=1,
    attention_width=3,
)
sys.argv = ["benchmark", *sys.argv[1:]]
runpy.run_module("launch.benchmark", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch, tiny_config):
    def tiny(**changes):
        # Most of a compilation would be dropout's random bits.
        return dataclasses.replace(
            tiny_config, attention_dropout=0.0, fusion_dropout=0.0, **changes
        )

    monkeypatch.setitem(benchmark.PRESETS, "tiny", tiny)
    monkeypatch.setitem(benchmark.LENGTHS, "few", lambda: np.array([1, 3, 1, 3, 1]))
    monkeypatch.setattr(benchmark, "_SHORTEST_RUN", 0.0)
    monkeypatch.setattr(benchmark, "matmul_peak", lambda config: 1e9)


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
    (rows,) = benchmark.benchmark(config).sections.values()
    assert [row["what"] for row in rows] == ["inference", "training step"]
    for row in rows:
        assert row["utterances"] == 12
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["utterances_per_second"] == pytest.approx(1e3 / row["ms_per_utterance"])
        assert row["peak_share"] == pytest.approx(row["model_gflop"] / (row["median_ms"] / 1e3))


def test_an_epoch_is_bucketed_and_its_padding_told():
    report = benchmark.benchmark(BenchmarkConfig(**TINY), lengths="few")
    ours, released = report.sections["epoch"]
    assert ours["utterances"] == released["utterances"] == 9
    assert ours["padding_share"] < released["padding_share"] < 1
    assert ours["median_ms"] > 0 and "median_ms" not in released


def test_parts_are_measured_forward_and_backward():
    rows = benchmark.benchmark(BenchmarkConfig(**TINY), parts=True).sections["parts"]
    by_name = {row["what"]: row for row in rows}
    model = BenchmarkConfig(**TINY).model
    for name in benchmark.model_flops(model, 4, 3):
        assert by_name[name]["forward_ms"] > 0
    parts = [row for row in rows[:-2] if row["what"] != "one of its scans"]
    assert by_name["sum of the parts"]["ms"] == pytest.approx(sum(row["ms"] for row in parts))


def test_json_holds_every_row(tmp_path):
    report = benchmark.benchmark(BenchmarkConfig(**TINY))
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["settings"]["preset"] == "tiny"
    assert written["environment"]["platform"] == "cpu"
    assert written["rows"] == [{"section": "steps", **row} for row in report.sections["steps"]]
    assert len(report.tables()) == 2


def test_candidates_are_timed_in_turns():
    order = []
    runs = {name: lambda times, name=name: order.append(name) for name in "ab"}
    timings = benchmark.measure(runs, rounds=3)
    assert order == list("ab" * 5)
    assert {len(timing.seconds) for timing in timings.values()} == {3}


def test_lengths_are_like_those_of_iemocap():
    lengths = benchmark.iemocap_like_lengths()
    assert len(lengths) == 120
    assert abs(lengths.mean() - 49) <= 1
    assert lengths.max() == 110
    np.testing.assert_array_equal(lengths, benchmark.iemocap_like_lengths())
    epoch = benchmark.released_epoch(lengths, 8)
    np.testing.assert_array_equal(np.sort(np.concatenate([b.rows for b in epoch])), range(120))
    positions = sum(len(batch.rows) * batch.num_utterances for batch in epoch)
    assert 0.28 < 1 - lengths.sum() / positions < 0.36


def test_model_flops_are_those_the_compiler_counts():
    # One utterance a dialogue, so that the compiler sees all steps of the recurrence. Without
    # dropout, whose random bits are arithmetic to it.
    config = MisterEConfig(
        speech_dim=128,
        text_dim=96,
        context_width=128,
        gru_layers=2,
        fusion_width=128,
        fusion_layers=2,
        attention_width=96,
        attention_dropout=0.0,
        fusion_dropout=0.0,
    )

    class Task:
        init = staticmethod(lambda key: MisterE(config, rngs=nnx.Rngs(key)))
        loss = staticmethod(mister_e_loss)

    transformation = optimizer(OptimizerConfig(), 1)
    graph = None

    def initial():
        nonlocal graph
        graph, state = initial_state(Task(), transformation, 0)
        return state

    state = jax.eval_shape(initial)
    step = train_step(Task(), graph, transformation)
    batch = benchmark.make_batch(config, np.ones(64, int), 1)
    lowered = jax.jit(step, static_argnums=2).lower(state, batch, None)
    parameters = sum(value.size for value in jax.tree.leaves(state["params"]))
    # Clip, Adam and the update: some 16 operations a parameter, which are no matrix products.
    expected = benchmark._training_flops(config, 64, 1) + 16 * parameters
    assert lowered.cost_analysis()["flops"] == pytest.approx(expected, rel=0.15)


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
        ({}, {"topology": "v5e:2x2", "parts": True}, "goes with no"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, options, message):
    with pytest.raises(InputError, match=message):
        benchmark.benchmark(BenchmarkConfig(**{**TINY, **fields}), **options)


def test_without_pytorch_the_comparison_says_so(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torch"):
        benchmark.benchmark(BenchmarkConfig(**TINY), compare=True)


def test_the_command_needs_little_more_than_jax(tmp_path):
    sizes = ("--preset=tiny", "--speech_dim=4", "--text_dim=4", "--batch_size=1", "--length=2")
    path = tmp_path / "report.json"
    done = run_command(
        *sizes, "--steps=1", f"--json={path}", code=BARE, JAX_DISABLE_MOST_OPTIMIZATIONS="1"
    )
    assert done.returncode == 0, done.stderr
    assert "training step" in done.stdout
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_the_command_tells_errors_in_one_line():
    done = run_command("--preset=huge")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: preset 'huge'; allowed are paper, small"
    )


@pytest.mark.parity
def test_pytorch_is_measured_beside_ours():
    pytest.importorskip("torch")
    report = benchmark.benchmark(BenchmarkConfig(**TINY), compare=True)
    rows = report.sections["steps"]
    assert [row["library"] for row in rows] == ["mister_jax", "torch"] * 2
    for ours, torch in zip(rows[::2], rows[1::2], strict=True):
        assert ours["time_over_ours"] == 1
        assert torch["time_over_ours"] == pytest.approx(torch["median_ms"] / ours["median_ms"])
    epoch = benchmark.benchmark(BenchmarkConfig(**TINY), lengths="few", compare=True)
    assert [row["median_ms"] > 0 for row in epoch.sections["epoch"]] == [True, True]


@pytest.mark.parity
def test_the_training_step_compiles_for_tpus(tmp_path):
    pytest.importorskip("libtpu")
    path = tmp_path / "report.json"
    done = run_command("--preset=small", "--aot=v5e:2x2", f"--json={path}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["fits"] and row["devices"] == 4
    assert 0 < row["total_mib_per_device"] < row["memory_mib_per_device"]


@pytest.mark.parity
def test_an_unknown_topology_is_refused():
    pytest.importorskip("libtpu")
    done = run_command("--preset=small", "--aot=v99:2x2")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: topology 'v99:2x2'")
