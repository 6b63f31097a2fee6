"""Learning-rate schedules."""

import numpy as np
import pytest

from mister_jax.optim import OptimizerConfig
from mister_jax.schedules import learning_rate_schedule


def test_schedule_is_constant_by_default():
    schedule = OptimizerConfig(learning_rate=0.5).make_schedule(10)
    assert [float(schedule(step)) for step in (0, 5, 100)] == [0.5] * 3


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.2])
def test_cosine_rises_to_its_peak_then_falls_to_zero(warmup_fraction):
    schedule = learning_rate_schedule(0.5, 50, name="cosine", warmup_fraction=warmup_fraction)
    rates = np.array([float(schedule(step)) for step in range(51)])
    peak = round(50 * warmup_fraction)
    assert rates[peak] == pytest.approx(0.5)
    np.testing.assert_allclose(rates[:peak], 0.5 * np.arange(peak) / max(peak, 1), atol=1e-6)
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[(50 + peak) // 2] == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0, abs=1e-7)


def test_constant_schedule_can_have_a_warmup():
    config = OptimizerConfig(learning_rate=0.5, warmup_fraction=0.1)
    schedule = config.make_schedule(20)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0, 0.25, 0.5, 0.5])


def test_cosine_schedule_of_a_single_step_is_finite():
    config = OptimizerConfig(schedule="cosine", warmup_fraction=0.9)
    assert np.isfinite(config.make_schedule(1)(0))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_warmup_fraction_outside_its_range_raises(fraction):
    with pytest.raises(ValueError, match=f"warmup_fraction={fraction}; allowed: 0 <= fraction < 1"):
        learning_rate_schedule(0.5, 10, warmup_fraction=fraction)


def test_an_unknown_schedule_raises():
    with pytest.raises(ValueError, match="name='linear'; allowed: constant, cosine"):
        learning_rate_schedule(0.5, 10, name="linear")
