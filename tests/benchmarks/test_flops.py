"""FLOPs are counted correctly from a traced program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fusion
from benchmarks.aot import abstract_state
from benchmarks.dialogues import make_batch
from benchmarks.flops import program_flops
from mister_jax import MisterEConfig


def count(function, *arguments):
    return program_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_flops_of_mister_e_agree_with_xla():
    # Use one utterance per dialogue, because XLA counts only one step of a recurrence. Disable
    # dropout, because XLA also counts the operations that generate its random bits.
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
    graph, state = abstract_state(lambda: fusion.initialize(config))
    step, _ = fusion.step_functions(config, graph)
    batch = make_batch(config, np.ones(64, int), 1)
    lowered = jax.jit(step, static_argnums=2).lower(state, batch, None)
    num_parameters = sum(value.size for value in jax.tree.leaves(state["params"]))
    # Clipping, Adam and the update take about 16 operations per parameter.
    xla_flops = lowered.cost_analysis()["flops"] - 16 * num_parameters
    train_flops, infer_flops = fusion.step_flops(config, 64, 1)
    assert xla_flops == pytest.approx(train_flops, rel=0.15)
    assert infer_flops < train_flops < 3 * infer_flops


def test_flops_of_mister_e_follow_from_its_sizes():
    config, positions, length = MisterEConfig.paper(speech_dim=2048, text_dim=2048), 16, 8

    def linear(inputs, outputs):
        return 2 * positions * inputs * outputs

    def gru(layers, inputs, outputs):
        per_layer = linear(outputs // 2, 3 * outputs)
        return (
            linear(inputs, 3 * outputs)
            + (layers - 1) * linear(outputs, 3 * outputs)
            + (layers * per_layer)
        )

    context, fused, attention = config.context_dim, config.fusion_dim, config.attention_dim
    features = config.speech_dim + config.text_dim
    expected = linear(features, context * sum(config.kernel_sizes))
    expected += 2 * gru(config.gru_layers, context, context)
    expected += linear(features, context) + 2 * linear(context, config.num_classes)
    expected += linear(features, 2 * fused)
    attended = linear(fused, 4 * attention) + 4 * positions * length * attention
    expected += config.fusion_layers * 4 * attended
    expected += gru(config.fusion_gru_layers, 2 * fused, fused) if config.fusion_gru_layers else 0
    expected += linear(2 * fused, fused) + linear(fused, config.num_classes)
    _, infer_flops = fusion.step_flops(config, positions // length, length)
    assert infer_flops == pytest.approx(expected, rel=1e-3)


def test_product_costs_two_operations_per_term():
    x, y = jnp.zeros((5, 2, 3)), jnp.zeros((5, 3, 4))
    assert count(jnp.matmul, x, y) == 2 * 5 * 2 * 3 * 4
    assert count(jax.grad(lambda x: (x @ y).sum()), x) == 2 * 2 * 5 * 2 * 3 * 4


def test_convolution_costs_two_operations_per_term():
    x, kernel = jnp.zeros((2, 6, 9)), jnp.zeros((4, 3, 5))  # groups of 3 channels

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", feature_group_count=2)

    assert count(convolve, x, kernel) == 2 * (2 * 4 * 5) * 3 * 5


def test_loop_counts_every_run_and_recomputation_counts_again():
    x, kernels = jnp.zeros((2, 3)), jnp.zeros((7, 3, 3))
    product = 2 * 2 * 3 * 3

    def run(x, layer=lambda x, kernel: (jnp.tanh(x @ kernel), None)):
        return jax.lax.scan(layer, x, kernels)[0].sum()

    def run_with_remat(x):
        return run(x, jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None)))

    assert count(run, x) == 7 * product
    assert count(jax.jit(jax.grad(run)), x) == 2 * 7 * product
    assert count(jax.grad(run_with_remat), x) == 3 * 7 * product


def test_more_expensive_branch_counts():
    x = jnp.zeros((3, 3))

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert count(either, x) == 2 * 2 * 27
