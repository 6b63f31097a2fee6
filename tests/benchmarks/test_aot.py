"""Steps are compiled for absent TPUs, and their predicted times and sizes are consistent."""

import importlib.util

import pytest

from benchmarks import aot, cli, fusion
from benchmarks.aot import CHIPS
from benchmarks.config import BenchmarkConfig
from benchmarks.report import Report
from mister_jax.errors import InputError
from tests.benchmarks.conftest import TINY

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs"
)


@pytest.mark.parity
@needs_libtpu
def test_step_is_predicted_for_every_topology_with_equal_work_per_chip():
    rows = fusion.compile_for_tpus(BenchmarkConfig(**TINY), "v5e:2x2,2x4")
    assert [row["topology"] for row in rows] == ["v5e:2x2", "v5e:2x4"]
    assert [row["devices"] for row in rows] == [4, 8]
    assert [row["dialogues"] for row in rows] == [4, 8]
    for row in rows:
        assert row["fits"] and row["device_kind"] == "TPU v5 lite"
        assert 0 < row["arguments_mib_per_device"] <= row["total_mib_per_device"]
        assert 0 < row["collectives_gb_per_device"] < row["memory_gb_per_device"]
        assert row["executed_gflop_per_device"] == pytest.approx(row["model_gflop_per_device"])
        resources = ("arithmetic_ms", "memory_ms", "collectives_ms", "compiler_ms")
        assert row["predicted_ms"] == max(row[name] for name in resources) > 0
        assert 0 < row["predicted_utilization"] < 1
    assert rows[0]["scaling_efficiency"] == 1
    assert rows[1]["scaling_efficiency"] == rows[0]["predicted_ms"] / rows[1]["predicted_ms"]


@pytest.mark.parity
@needs_libtpu
def test_report_says_if_a_step_does_not_fit(monkeypatch):
    kind = "TPU v5 lite"
    monkeypatch.setitem(CHIPS, kind, CHIPS[kind]._replace(memory=1000))
    sections = cli.measure_fusion(BenchmarkConfig(**TINY), topologies="v5e:2x2")
    assert not Report({}, {}, sections).fits
    (title,) = sections
    assert "predicted" in title


@needs_libtpu
@pytest.mark.parametrize(
    ("topologies", "batch_size", "message"),
    [
        ("v99:2x2", 4, "topology 'v99:2x2'"),
        ("v5e:2x2,3", 4, "topology 'v5e:3'"),
        ("2x2", 4, "topology ':2x2'"),
        ("v5e:2x2", 6, "--batch_size=6; allowed: multiples of the 4 devices"),
    ],
)
def test_errors_are_one_line(topologies, batch_size, message):
    config = BenchmarkConfig(**TINY | {"batch_size": batch_size})
    with pytest.raises(InputError, match=message) as error:
        fusion.compile_for_tpus(config, topologies)
    assert "\n" not in str(error.value)


def test_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
        fusion.compile_for_tpus(BenchmarkConfig(**TINY), "v5e:2x2")


def test_scaling_efficiency_needs_both_times():
    rows = [{"predicted_ms": 6.0}, {"predicted_ms": 8.0}, {"fits": False}]
    aot.add_scaling_efficiency(rows)
    assert [row.get("scaling_efficiency") for row in rows] == [1, 0.75, None]
