"""The matrix products of a model, counted from its sizes.

A multiplication and its addition are two operations. What is not a matrix product is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mister_jax.encoders.beats import BeatsConfig
from mister_jax.encoders.decoder import DecoderConfig
from mister_jax.encoders.salmonn import SalmonnConfig
from mister_jax.encoders.whisper import WhisperConfig
from mister_jax.models import EXPERTS, MisterEConfig, UtteranceConfig


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
    width, fusion, attention = config.context_width, config.fusion_width, config.attention_width
    features = config.speech_dim + config.text_dim
    experts, classes = len(EXPERTS), config.num_classes

    def linear(inputs: int, outputs: int) -> float:
        return 2.0 * positions * inputs * outputs

    def flops(of_batch: float, of_hidden: float = 0.0) -> Flops:
        return Flops(of_batch + of_hidden, of_batch + 2 * of_hidden)

    recurrence = linear(width, 3 * width) + linear(width // 2, 3 * width)
    attended = 4 * (linear(fusion, 4 * attention) + 4.0 * positions * length * attention)
    return {
        CONVOLUTIONS: flops(linear(features, width * sum(config.kernel_sizes))),
        RECURRENCE: flops(0, 2 * config.gru_layers * recurrence),
        CONTEXT_HEADS: flops(linear(features, width), 2 * linear(width, classes)),
        CROSS_MODAL: flops(
            linear(features, 2 * fusion),
            config.fusion_layers * attended + linear(2 * fusion, fusion) + linear(fusion, classes),
        ),
        GATE_AND_LOSSES: flops(
            0,
            linear(experts * classes, config.gate_width)
            + linear(config.gate_width, experts)
            + linear(experts, classes)
            + 2.0 * (2 * positions) ** 2 * fusion,
        ),
    }


def forward_flops(config: MisterEConfig, dialogues: int, length: int) -> float:
    parts = model_flops(config, dialogues, length)
    return sum(part.forward for name, part in parts.items() if name != GATE_AND_LOSSES)


def training_flops(config: MisterEConfig, dialogues: int, length: int) -> float:
    return sum(sum(part) for part in model_flops(config, dialogues, length).values())


def decoder_flops(config: DecoderConfig, sequences: int, length: int) -> Flops:
    """A decoder that is frozen, but for its low-rank paths.

    The gradient goes through every frozen product once, through attention and the low-rank paths
    twice. Attention is counted whole, as it is computed, not its causal half.

    Args:
      config: sizes, and LoRA if there is any.
      sequences: B.
      length: N.
    """
    tokens = sequences * length
    queries = config.num_heads * config.head_width
    keys = config.num_key_value_heads * config.head_width
    sizes = {
        "query": (config.width, queries),
        "key": (config.width, keys),
        "value": (config.width, keys),
        "out": (queries, config.width),
        "gate": (config.width, config.mlp_width),
        "up": (config.width, config.mlp_width),
        "down": (config.mlp_width, config.width),
    }
    frozen = sum(2.0 * tokens * inputs * outputs for inputs, outputs in sizes.values())
    learned = 4.0 * tokens * length * queries
    if config.lora is not None:
        for target in config.lora.targets:
            inputs, outputs = sizes[target.rpartition("/")[2]]
            learned += 2.0 * tokens * config.lora.rank * (inputs + outputs)
    layers = config.num_layers
    return Flops(layers * (frozen + learned), layers * (frozen + 2 * learned))


def whisper_flops(config: WhisperConfig, clips: int, positions: int) -> float:
    """The forward pass of Whisper's encoder.

    Args:
      config: sizes.
      clips: B.
      positions: N, of 20 ms each.
    """
    width, vectors = config.width, clips * positions
    convolutions = 2.0 * vectors * 3 * width * (2 * config.num_mel_bins + width)
    kernels = 4 * width**2 + 2 * width * config.hidden_width
    layer = 2.0 * vectors * kernels + 4.0 * vectors * positions * width
    return convolutions + config.num_layers * layer


def beats_flops(config: BeatsConfig, clips: int, frames: int) -> float:
    """The forward pass of BEATs.

    Args:
      config: sizes.
      clips: B.
      frames: F, of 10 ms each.
    """
    width, length = config.width, config.num_tokens(frames)
    vectors = clips * length
    patches = config.patch_size**2 * config.patch_width + config.patch_width * width
    position = config.position_kernel * width * (width // config.position_groups)
    kernels = 4 * width**2 + 2 * width * config.hidden_width + 8 * width
    layer = 2.0 * vectors * kernels + 4.0 * vectors * length * width
    return 2.0 * vectors * (patches + position) + config.num_layers * layer


def qformer_flops(config: SalmonnConfig, clips: int, positions: int) -> float:
    """The forward pass of SALMONN's window-level Q-Former.

    Args:
      config: sizes.
      clips: B.
      positions: T, of 20 ms each.
    """
    former = config.qformer
    width, queries = former.width, clips * former.num_tokens(positions)
    windows = queries // former.num_queries
    frames = config.whisper.width + config.beats.width
    of_query = 6 * width**2 + 2 * width * former.hidden_width
    of_query += 2 * width * (former.num_queries + former.window)
    of_frame = 2 * frames * width
    layer = 2.0 * (queries * of_query + windows * former.window * of_frame)
    projection = 2.0 * queries * width * config.decoder.width
    return former.num_layers * layer + projection


def head_flops(head: UtteranceConfig, width: int, sequences: int, length: int) -> Flops:
    """The trained head of an utterance encoder.

    Args:
      head: its config.
      width: D.
      sequences: B.
      length: N.
    """
    pooled = 2 * width if head.pooling == "statistics" else width
    forward = 2.0 * sequences * head.feature_dim * (pooled + head.num_classes)
    if head.pooling == "statistics":
        forward += 2.0 * sequences * length * (width**2 + width)
    return Flops(forward, 2 * forward)


def program_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """The products and convolutions that a function computes as it is written.

    The body of a scan counts as often as it runs, and so does what is computed anew in a backward
    pass.

    Args:
      function: of arrays.
      *arguments: trees of arrays, or of their shapes.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> float:
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
            total += max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(map(_jaxpr_flops, jax.core.jaxprs_in_params(params)))
            total += inner * (params["length"] if name == "scan" else 1)
    return total
