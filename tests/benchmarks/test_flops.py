"""Operations are counted right, from a model's sizes and from a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.aot import abstract_state
from benchmarks.dialogues import make_batch
from benchmarks.flops import program_flops, training_flops
from mister_jax import MisterE, MisterEConfig
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.tasks.fusion import mister_e_loss
from mister_jax.training.steps import initial_state, make_train_step


def counted(function, *arguments):
    return program_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_flops_of_mister_e_are_those_the_compiler_counts():
    # One utterance a dialogue, so that the compiler sees all steps of the recurrence. Without
    # dropout, whose random bits are arithmetic to it.
    config = MisterEConfig(
        speech_dim=128,
        text_dim=96,
        context_dim=128,
        gru_layers=2,
        fusion_dim=128,
        fusion_layers=2,
        fusion_gru_layers=2,
        gate_dim=128,
        gate_reads_contexts=True,
        attention_dim=96,
        attention_dropout=0.0,
        fusion_dropout=0.0,
    )

    class Task:
        init = staticmethod(lambda key: MisterE(config, rngs=nnx.Rngs(key)))
        loss = staticmethod(mister_e_loss)

    transformation = make_optimizer(OptimizerConfig(), 1)
    graph, state = abstract_state(lambda: initial_state(Task(), transformation, 0))
    step = make_train_step(Task(), graph, transformation)
    batch = make_batch(config, np.ones(64, int), 1)
    traced = jax.jit(step, static_argnums=2).trace(state, batch, None)
    parameters = sum(value.size for value in jax.tree.leaves(state["params"]))
    # Clip, Adam and the update: some 16 operations a parameter, which are no matrix products.
    compiler = traced.lower().cost_analysis()["flops"] - 16 * parameters
    assert compiler == pytest.approx(training_flops(config, 64, 1), rel=0.15)
    assert program_flops(traced.jaxpr.jaxpr) == pytest.approx(training_flops(config, 64, 1), 0.05)


def test_a_product_costs_two_operations_a_term():
    x, y = jnp.zeros((5, 2, 3)), jnp.zeros((5, 3, 4))
    assert counted(jnp.matmul, x, y) == 2 * 5 * 2 * 3 * 4
    assert counted(jax.grad(lambda x: (x @ y).sum()), x) == 2 * 2 * 5 * 2 * 3 * 4


def test_a_convolution_costs_two_operations_a_term():
    x, kernel = jnp.zeros((2, 6, 9)), jnp.zeros((4, 3, 5))  # groups of 3 channels

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", feature_group_count=2)

    assert counted(convolve, x, kernel) == 2 * (2 * 4 * 5) * 3 * 5


def test_a_loop_counts_as_often_as_it_runs_and_what_is_computed_anew_twice():
    x, kernels = jnp.zeros((2, 3)), jnp.zeros((7, 3, 3))
    product = 2 * 2 * 3 * 3

    def run(x, layer=lambda x, kernel: (jnp.tanh(x @ kernel), None)):
        return jax.lax.scan(layer, x, kernels)[0].sum()

    def anew(x):
        return run(x, jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None)))

    assert counted(run, x) == 7 * product
    assert counted(jax.jit(jax.grad(run)), x) == 2 * 7 * product
    assert counted(jax.grad(anew), x) == 3 * 7 * product


def test_of_two_branches_the_costlier_counts():
    x = jnp.zeros((3, 3))

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert counted(either, x) == 2 * 2 * 27
