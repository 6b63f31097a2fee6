"""The matrix products of MiSTER-E, counted from its sizes, and those of any traced program.

A multiplication and its addition are two operations. What is not a matrix product is left out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax.extend import core

from mister_jax.models import EXPERTS, MisterEConfig

CONVOLUTIONS = "convolutions"
RECURRENCE = "GRU"
CONTEXT_HEADS = "skips, classifiers"
CROSS_MODAL = "cross-modal expert"
GATE_AND_LOSSES = "gate, losses"
OPTIMISER = "optimiser"


class Flops(NamedTuple):
    """Floating-point operations of a part, a multiplication and its addition counted as two."""

    forward: float
    backward: float


def model_flops(config: MisterEConfig, dialogues: int, length: int) -> dict[str, Flops]:
    """The matrix products of a training step, by part.

    The gradient costs two products for each one of the forward pass, but one where the input is
    the batch, which needs no gradient. What is not a matrix product is left out. Padding counts
    like utterances.

    Args:
      config: of a model with all experts, a GRU and convolutions.
      dialogues: B.
      length: T.
    """
    positions = dialogues * length
    width, fusion, attention = config.context_dim, config.fusion_dim, config.attention_dim
    features = config.speech_dim + config.text_dim
    experts, classes = len(EXPERTS), config.num_classes

    def linear(inputs: int, outputs: int) -> float:
        return 2.0 * positions * inputs * outputs

    def flops(of_batch: float, of_hidden: float = 0.0) -> Flops:
        return Flops(of_batch + of_hidden, of_batch + 2 * of_hidden)

    def gru(layers: int, inputs: int, outputs: int) -> float:
        read = linear(inputs, 3 * outputs) + (layers - 1) * linear(outputs, 3 * outputs)
        return (read + layers * linear(outputs // 2, 3 * outputs)) if layers else 0.0

    attended = 4 * (linear(fusion, 4 * attention) + 4.0 * positions * length * attention)
    return {
        CONVOLUTIONS: flops(linear(features, width * sum(config.kernel_sizes))),
        RECURRENCE: flops(0, 2 * gru(config.gru_layers, width, width)),
        CONTEXT_HEADS: flops(linear(features, width), 2 * linear(width, classes)),
        CROSS_MODAL: flops(
            linear(features, 2 * fusion),
            config.fusion_layers * attended
            + gru(config.fusion_gru_layers, 2 * fusion, fusion)
            + linear(2 * fusion, fusion)
            + linear(fusion, classes),
        ),
        GATE_AND_LOSSES: flops(
            0,
            linear(experts * classes + 2 * width * config.gate_reads_contexts, config.gate_dim)
            + linear(config.gate_dim, experts)
            + linear(experts, classes)
            + 2.0 * (2 * positions) ** 2 * fusion,
        ),
    }


def forward_flops(config: MisterEConfig, dialogues: int, length: int) -> float:
    """Of inference; see `model_flops`."""
    parts = model_flops(config, dialogues, length)
    return sum(part.forward for name, part in parts.items() if name != GATE_AND_LOSSES)


def training_flops(config: MisterEConfig, dialogues: int, length: int) -> float:
    """Of a training step; see `model_flops`."""
    return sum(sum(part) for part in model_flops(config, dialogues, length).values())


def program_flops(jaxpr: Any) -> float:
    """The products and convolutions of a program as it is written.

    The body of a scan counts as often as it runs, and so does what is computed anew in a backward
    pass.

    Args:
      jaxpr: of the traced program.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            terms = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * equation.outvars[0].aval.size * terms
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
        elif name == "cond":
            total += max(program_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(map(program_flops, core.jaxprs_in_params(params)))
            total += inner * (params["length"] if name == "scan" else 1)
    return total
