"""The optimizer and its config."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mister_jax import optim
from mister_jax.nn import GRU, ParallelConvolution
from mister_jax.optim import OptimizerConfig

PARAMS = {"kernel": np.full((2, 3), 2, np.float32), "bias": np.full(3, 2, np.float32)}
GRADIENTS = {"kernel": np.full((2, 3), 30, np.float32), "bias": np.zeros(3, np.float32)}


def run_steps(config, gradients, params, steps=1):
    """Returns parameters and state after some steps with the same gradients."""
    transformation = optim.make_optimizer(config, total_steps=10)

    @jax.jit
    def step(params, state):
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(transformation.init)(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_default_is_clipped_adam_with_the_released_learning_rate():
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-5))

    @jax.jit
    def reference_step(params):
        updates, _ = reference.update(GRADIENTS, reference.init(params), params)
        return optax.apply_updates(params, updates)

    params, _ = run_steps(OptimizerConfig(), GRADIENTS, PARAMS)
    chex.assert_trees_all_equal(params, reference_step(PARAMS))


def test_gradients_are_clipped_by_global_norm_if_configured():
    # With a large epsilon, Adam's step size depends on the size of the gradient.
    step_sizes = {}
    for clip_norm in (0.0, 1.0, 1e6):
        config = OptimizerConfig(clip_norm=clip_norm, eps=1e3, learning_rate=1.0)
        params, _ = run_steps(config, GRADIENTS, PARAMS)
        step_sizes[clip_norm] = float(PARAMS["kernel"][0, 0] - params["kernel"][0, 0])
    assert step_sizes[0.0] == pytest.approx(30 / 1030, rel=1e-3)
    assert step_sizes[1e6] == step_sizes[0.0]
    clipped = 1 / np.sqrt(6)  # Six gradients of this size have the norm 1.
    assert step_sizes[1.0] == pytest.approx(clipped / (1000 + clipped), rel=1e-3)


class AllKindsOfParameters(nnx.Module):
    def __init__(self, rngs):
        self.convolution = ParallelConvolution(2, 2, rngs=rngs)
        self.gru = GRU(2, 2, rngs=rngs)
        self.norm = nnx.LayerNorm(2, rngs=rngs)
        self.linear = nnx.Linear(2, 2, rngs=rngs)


def test_weight_decay_acts_on_kernels_only():
    shapes = nnx.state(nnx.eval_shape(lambda: AllKindsOfParameters(nnx.Rngs(0))), nnx.Param)
    params = jax.tree.map(lambda shape: np.ones(shape.shape, np.float32), shapes)
    config = OptimizerConfig(name="adamw", weight_decay=0.1, learning_rate=0.5)
    decayed, _ = run_steps(config, jax.tree.map(np.zeros_like, params), params)
    for path, value in jax.tree_util.tree_leaves_with_path(decayed):
        name = jax.tree_util.keystr(path)
        expected = 1 - 0.1 * 0.5 if "kernel" in name else 1.0
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)


def test_average_forgets_early_parameters_faster():
    config = OptimizerConfig(average_decay=0.2, learning_rate=0.1)
    params, state = run_steps(config, GRADIENTS, PARAMS)
    # The decay rates are 1/10, 2/11, then always 0.2, because (1 + 2) / (10 + 2) exceeds 0.2.
    expected = 0.1 * PARAMS["kernel"] + 0.9 * params["kernel"]
    np.testing.assert_allclose(
        optim.params_for_evaluation(params, state)["kernel"], expected, rtol=1e-6
    )
    for steps, decay in ((2, 2 / 11), (3, 0.2), (4, 0.2)):
        params, state = run_steps(config, GRADIENTS, PARAMS, steps)
        expected = decay * expected + (1 - decay) * params["kernel"]
        average = optim.params_for_evaluation(params, state)["kernel"]
        np.testing.assert_allclose(average, expected, rtol=1e-6)


def test_average_does_not_change_training():
    plain, _ = run_steps(OptimizerConfig(), GRADIENTS, PARAMS, 3)
    averaged, _ = run_steps(OptimizerConfig(average_decay=0.9), GRADIENTS, PARAMS, 3)
    jax.tree.map(np.testing.assert_array_equal, plain, averaged)


def test_parameters_are_evaluated_directly_without_an_average():
    params, state = run_steps(OptimizerConfig(), GRADIENTS, PARAMS)
    assert optim.params_for_evaluation(params, state) is params


def test_parameters_and_their_average_can_be_donated_together():
    transformation = optim.make_optimizer(OptimizerConfig(average_decay=0.9), 10)
    params = jax.tree.map(jnp.copy, PARAMS)

    def step(params, state):
        updates, state = transformation.update(GRADIENTS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(step, donate_argnums=(0, 1))(params, transformation.init(params))
    assert np.isfinite(optim.params_for_evaluation(params, state)["kernel"]).all()


def test_average_needs_the_parameters():
    average = optim.average_parameters(0.9)
    with pytest.raises(ValueError, match="needs params"):
        average.update(GRADIENTS, average.init(PARAMS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("learning_rate", 0.0),
        ("learning_rate", np.nan),
        ("schedule", "linear"),
        ("warmup_fraction", 1.0),
        ("warmup_fraction", -0.1),
        ("weight_decay", -0.1),
        ("clip_norm", -1.0),
        ("clip_norm", np.nan),
        ("average_decay", 1.0),
    ],
)
def test_invalid_values_raise_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"OptimizerConfig\.{field}=.*; allowed: "):
        OptimizerConfig(**{field: value})


def test_weight_decay_with_adam_raises():
    with pytest.raises(ValueError, match="needs name='adamw'"):
        OptimizerConfig(weight_decay=0.1)


def test_updates_of_vectors_equal_those_of_the_tree():
    random = np.random.default_rng(0)
    params = nnx.as_pure(nnx.state(nnx.jit(lambda: GRU(5, 3, rngs=nnx.Rngs(0)))()))
    gradients = jax.tree.map(lambda p: random.normal(size=p.shape).astype(p.dtype), params)
    config = OptimizerConfig(
        name="adamw", learning_rate=0.1, weight_decay=0.5, clip_norm=0.3, average_decay=0.9
    )
    vectors = optim.ParamVectors(params)
    expected, expected_state = run_steps(config, gradients, params, steps=3)
    flat, state = run_steps(config, vectors.flatten(gradients), vectors.flatten(params), steps=3)
    chex.assert_trees_all_close(vectors.unflatten(flat), expected, atol=1e-6)
    average = optim.params_for_evaluation(flat, state)
    expected_average = optim.params_for_evaluation(expected, expected_state)
    chex.assert_trees_all_close(vectors.unflatten(average), expected_average, atol=1e-6)
    assert {name: vector.ndim for name, vector in flat.items()} == {"decayed": 1, "not_decayed": 1}


def test_vectors_with_leading_axes_give_parameters_with_leading_axes():
    vectors = optim.ParamVectors(PARAMS)
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *(vectors.flatten(PARAMS) for _ in range(4)))
    params = vectors.unflatten(stacked)
    chex.assert_trees_all_equal(params, jax.tree.map(lambda p: jnp.stack([p] * 4), PARAMS))


def test_parameters_of_several_types_have_no_vectors():
    with pytest.raises(ValueError, match="the same dtype"):
        optim.ParamVectors({"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.bfloat16)})


def test_the_average_of_bfloat16_parameters_is_float32_and_used_as_bfloat16():
    params = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
    average = optim.average_parameters(0.999)
    state = average.init(params)
    assert state.average["kernel"].dtype == jnp.float32
    start = state._replace(updates=jnp.full([], 100_000, jnp.int32))
    # One update moves the average by 1e-3, which bfloat16 would round to zero near 1.
    _, state = average.update({"kernel": jnp.ones((2, 3), jnp.bfloat16)}, start, params)
    np.testing.assert_allclose(state.average["kernel"], 1.001, rtol=1e-6)
    for _ in range(9):
        _, state = average.update({"kernel": jnp.ones((2, 3), jnp.bfloat16)}, state, params)
    used = optim.params_for_evaluation(params, (state,))["kernel"]
    assert used.dtype == jnp.bfloat16
    np.testing.assert_allclose(used.astype(np.float32), 2 - 0.999**10, rtol=4e-3)
    assert (used != params["kernel"]).all()
