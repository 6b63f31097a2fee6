"""Programs compile for TPUs that are not there, and what is said of them is consistent."""

import importlib.util

import pytest

import benchmarks
from benchmarks import BenchmarkConfig, aot
from benchmarks.chips import CHIPS
from mister_jax.errors import InputError
from tests.benchmarks.conftest import TINY

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs by libtpu"
)


@pytest.mark.parity
@needs_libtpu
def test_a_step_is_predicted_at_every_topology_with_equal_work_a_chip():
    rows = aot.compile_for_tpus(BenchmarkConfig(**TINY), "v5e:2x2,2x4")
    assert [row["topology"] for row in rows] == ["v5e:2x2", "v5e:2x4"]
    assert [row["devices"] for row in rows] == [4, 8]
    assert [row["dialogues"] for row in rows] == [4, 8]
    for row in rows:
        assert row["fits"] and row["device_kind"] == "TPU v5 lite"
        assert 0 < row["arguments_mib_per_device"] <= row["total_mib_per_device"]
        assert 0 < row["collectives_gb_per_device"] < row["memory_gb_per_device"]
        # The contrastive loss of the batch grows with its square, the rest with the batch.
        assert row["executed_gflop_per_device"] == pytest.approx(
            row["model_gflop_per_device"], rel=0.3
        )
        resources = ("arithmetic_ms", "memory_ms", "collectives_ms", "compiler_ms")
        assert row["predicted_ms"] == max(row[name] for name in resources) > 0
        assert 0 < row["predicted_utilisation"] < 1
    assert rows[0]["scaling_efficiency"] == 1
    assert rows[1]["scaling_efficiency"] == rows[0]["predicted_ms"] / rows[1]["predicted_ms"]


@pytest.mark.parity
@needs_libtpu
def test_what_does_not_fit_makes_the_report_fail(monkeypatch):
    kind = "TPU v5 lite"
    monkeypatch.setitem(CHIPS, kind, CHIPS[kind]._replace(memory=1000))
    report = benchmarks.benchmark(BenchmarkConfig(**TINY), topologies="v5e:2x2")
    assert not report.fits
    (title,) = report.sections
    assert "predicted" in title


@needs_libtpu
@pytest.mark.parametrize(
    "topologies, batch_size, message",
    [
        ("v99:2x2", 4, "topology 'v99:2x2'"),
        ("v5e:2x2,3", 4, "topology 'v5e:3'"),
        ("2x2", 4, "topology ':2x2'"),
        ("v5e:2x2", 6, "batch_size 6; allowed are multiples of the 4 devices"),
    ],
)
def test_what_cannot_be_compiled_for_is_said_in_one_line(topologies, batch_size, message):
    config = BenchmarkConfig(**TINY | {"batch_size": batch_size})
    with pytest.raises(InputError, match=message) as error:
        aot.compile_for_tpus(config, topologies)
    assert "\n" not in str(error.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
        aot.compile_for_tpus(BenchmarkConfig(**TINY), "v5e:2x2")


def test_efficiency_is_told_where_both_times_are_known():
    rows = [{"predicted_ms": 6.0}, {"predicted_ms": 8.0}, {"fits": False}]
    aot.add_efficiency(rows)
    assert [row.get("scaling_efficiency") for row in rows] == [1, 0.75, None]
