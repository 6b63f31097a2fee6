"""Optimisers from their config."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mister_jax import optim
from mister_jax.nn import GRU, ParallelConvolution
from mister_jax.optim import OptimizerConfig

PARAMS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
GRADIENTS = {"kernel": jnp.full((2, 3), 30.0), "bias": jnp.zeros(3)}


def updates_of(config, gradients, params, steps=1):
    """Parameters and state after some steps with the same gradients."""
    transformation = optim.make_optimizer(config, total_steps=10)

    @jax.jit
    def step(params, state):
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = transformation.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_defaults_are_clipped_adam_at_the_released_rate():
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-5))
    expected, _ = reference.update(GRADIENTS, reference.init(PARAMS), PARAMS)
    ours, _ = updates_of(OptimizerConfig(), GRADIENTS, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, ours, optax.apply_updates(PARAMS, expected))


def test_gradients_are_clipped_by_their_global_norm_only_where_asked():
    # With a large epsilon, the size of Adam's step depends on that of the gradient.
    moved = {}
    for clip_norm in (0.0, 1.0, 1e6):
        config = OptimizerConfig(clip_norm=clip_norm, eps=1e3, learning_rate=1.0)
        params, _ = updates_of(config, GRADIENTS, PARAMS)
        moved[clip_norm] = float(PARAMS["kernel"][0, 0] - params["kernel"][0, 0])
    assert moved[0.0] == pytest.approx(30 / 1030, rel=1e-3)
    assert moved[1e6] == moved[0.0]
    share = 1 / np.sqrt(6)  # each of six gradients, together of norm 1
    assert moved[1.0] == pytest.approx(share / (1000 + share), rel=1e-3)


class EveryKindOfParameter(nnx.Module):
    def __init__(self, rngs):
        self.convolution = ParallelConvolution(2, 2, rngs=rngs)
        self.gru = GRU(2, 2, rngs=rngs)
        self.norm = nnx.LayerNorm(2, rngs=rngs)
        self.linear = nnx.Linear(2, 2, rngs=rngs)


def test_weight_decay_acts_on_kernels_only():
    shapes = nnx.state(nnx.eval_shape(lambda: EveryKindOfParameter(nnx.Rngs(0))), nnx.Param)
    params = jax.tree.map(lambda shape: jnp.ones(shape.shape), shapes)
    config = OptimizerConfig(name="adamw", weight_decay=0.1, learning_rate=0.5)
    decayed, _ = updates_of(config, jax.tree.map(jnp.zeros_like, params), params)
    for path, value in jax.tree_util.tree_leaves_with_path(decayed):
        name = jax.tree_util.keystr(path)
        expected = 1 - 0.1 * 0.5 if "kernel" in name else 1.0
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)


def test_the_average_forgets_early_parameters_sooner():
    config = OptimizerConfig(average_decay=0.2, learning_rate=0.1)
    params, state = updates_of(config, GRADIENTS, PARAMS)
    # Decays are 1/10, 2/11, then 0.2 for good, as (1 + 2) / (10 + 2) is more.
    expected = 0.1 * PARAMS["kernel"] + 0.9 * params["kernel"]
    np.testing.assert_allclose(
        optim.params_for_evaluation(params, state)["kernel"], expected, rtol=1e-6
    )
    for steps, decay in ((2, 2 / 11), (3, 0.2), (4, 0.2)):
        params, state = updates_of(config, GRADIENTS, PARAMS, steps)
        expected = decay * expected + (1 - decay) * params["kernel"]
        average = optim.params_for_evaluation(params, state)["kernel"]
        np.testing.assert_allclose(average, expected, rtol=1e-6)


def test_the_average_does_not_change_the_training():
    plain, _ = updates_of(OptimizerConfig(), GRADIENTS, PARAMS, 3)
    averaged, _ = updates_of(OptimizerConfig(average_decay=0.9), GRADIENTS, PARAMS, 3)
    jax.tree.map(np.testing.assert_array_equal, plain, averaged)


def test_parameters_are_evaluated_as_they_are_without_an_average():
    params, state = updates_of(OptimizerConfig(), GRADIENTS, PARAMS)
    assert optim.params_for_evaluation(params, state) is params


def test_parameters_and_their_average_can_be_donated_together():
    transformation = optim.make_optimizer(OptimizerConfig(average_decay=0.9), 10)
    params = jax.tree.map(jnp.copy, PARAMS)

    def step(params, state):
        updates, state = transformation.update(GRADIENTS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(step, donate_argnums=(0, 1))(params, transformation.init(params))
    assert np.isfinite(optim.params_for_evaluation(params, state)["kernel"]).all()


def test_averages_need_the_parameters():
    average = optim.average_parameters(0.9)
    with pytest.raises(ValueError, match="needs the parameters"):
        average.update(GRADIENTS, average.init(PARAMS))


def test_the_rate_is_constant_by_default():
    rate = optim.learning_rate(OptimizerConfig(learning_rate=0.5), 10)
    assert [float(rate(step)) for step in (0, 5, 100)] == [0.5] * 3


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.2])
def test_cosine_rises_to_its_peak_then_falls_to_zero(warmup_fraction):
    config = OptimizerConfig(learning_rate=0.5, schedule="cosine", warmup_fraction=warmup_fraction)
    rate = optim.learning_rate(config, 50)
    rates = np.array([float(rate(step)) for step in range(51)])
    peak = round(50 * warmup_fraction)
    assert rates[peak] == pytest.approx(0.5)
    np.testing.assert_allclose(rates[:peak], 0.5 * np.arange(peak) / max(peak, 1), atol=1e-6)
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[(50 + peak) // 2] == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0, abs=1e-7)


def test_a_constant_rate_can_have_a_warm_up():
    config = OptimizerConfig(learning_rate=0.5, warmup_fraction=0.1)
    rate = optim.learning_rate(config, 20)
    np.testing.assert_allclose([rate(step) for step in range(4)], [0, 0.25, 0.5, 0.5])


def test_cosine_of_a_single_step_is_finite():
    config = OptimizerConfig(schedule="cosine", warmup_fraction=0.9)
    assert np.isfinite(optim.learning_rate(config, 1)(0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("learning_rate", 0.0),
        ("schedule", "linear"),
        ("warmup_fraction", 1.0),
        ("warmup_fraction", -0.1),
        ("weight_decay", -0.1),
        ("clip_norm", -1.0),
        ("average_decay", 1.0),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"OptimizerConfig\.{field}=.*allowed is"):
        OptimizerConfig(**{field: value})


def test_adam_refuses_weight_decay():
    with pytest.raises(ValueError, match="needs name='adamw'"):
        OptimizerConfig(weight_decay=0.1)
