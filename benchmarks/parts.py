"""The parts of MiSTER-E, each alone, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.config import BenchmarkConfig
from benchmarks.dialogues import make_batch
from benchmarks.flops import (
    CONTEXT_HEADS,
    CONVOLUTIONS,
    CROSS_MODAL,
    GATE_AND_LOSSES,
    OPTIMISER,
    RECURRENCE,
    model_flops,
)
from benchmarks.libraries import Ours, Training
from benchmarks.measure import Run, measure, repeated
from benchmarks.report import Row
from mister_jax import losses
from mister_jax.errors import InputError
from mister_jax.models import EXPERTS, MisterE, MisterEOutput
from mister_jax.models import apply_context_experts
from mister_jax.nn import PerExampleRngs, gru_scan, run_grus
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.training.steps import initial_state

Part = Callable[[Any, Any], Any]
"""A part of the model: from what it is differentiated by, and what not, to a tree of arrays."""


def _model_parts(config: BenchmarkConfig) -> dict[str, tuple[Part, Any, Any]]:
    """The parts that have a gradient, each with what it is differentiated by and what not."""
    model_config = config.model
    model = MisterE(model_config, rngs=nnx.Rngs(0))
    shape = (config.batch_size, config.length)
    batch = make_batch(model_config, np.full(config.batch_size, config.length), config.length)
    dtype = jnp.dtype(config.dtype)
    speech, text = (jnp.asarray(batch[name], dtype) for name in ("speech", "text"))
    mask, label = jnp.asarray(batch["mask"]), jnp.asarray(batch["label"])
    key = jax.random.key(0)

    def hidden(width: int, kind: Any = dtype) -> jax.Array:
        return jax.random.normal(key, (*shape, width), kind)

    def split(modules: Any) -> tuple[Any, Any]:
        graph, params = nnx.split(modules)
        return graph, nnx.as_pure(params)

    contexts = (model.speech, model.text)
    convolutions, convolution_params = split([expert.convolution for expert in contexts])
    grus, gru_params = split([expert.gru for expert in contexts])
    # Without them what is left of a context expert is the skip and the classifier.
    for expert in contexts:
        expert.convolution = expert.gru = None
    heads, head_params = split(list(contexts))
    cross_modal, cross_modal_params = split(model.fusion)
    gate, gate_params = split(model.gate)
    width, fusion = model_config.context_dim, model_config.fusion_dim

    def convolve(params, inputs):
        layers = nnx.merge(convolutions, params)
        return [layer(x, mask) for layer, x in zip(layers, inputs, strict=True)]

    def recur(differentiated, _):
        params, inputs = differentiated
        return run_grus(nnx.merge(grus, params), inputs, mask)

    def head(params, inputs):
        return apply_context_experts(tuple(nnx.merge(heads, params)), inputs, mask)

    def fuse(params, inputs):
        keys = PerExampleRngs.from_batch_key(key, shape[0])
        expert = nnx.merge(cross_modal, params)
        return expert(*inputs, mask, mask, deterministic=False, rngs=keys)

    def weigh(differentiated, _):
        params, expert_logits, speech_repr, text_repr = differentiated
        present = jnp.broadcast_to(mask[..., None], expert_logits.shape[:-1])
        weights = nnx.merge(gate, params)(expert_logits, present)
        output = MisterEOutput(
            logits=jnp.einsum("bte,btec->btc", weights, expert_logits),
            expert_logits=expert_logits,
            gate=weights,
            expert_present=present,
            speech_context=jnp.zeros((*shape, 0)),
            text_context=jnp.zeros((*shape, 0)),
            speech_repr=speech_repr,
            text_repr=text_repr,
            speech_present=mask,
            text_present=mask,
        )
        return losses.mister_e(output, label, mask)[0]

    expert_logits = jax.random.normal(
        key, (*shape, len(EXPERTS), model_config.num_classes), jnp.float32
    )
    return {
        CONVOLUTIONS: (convolve, convolution_params, (speech, text)),
        RECURRENCE: (recur, (gru_params, [hidden(width), hidden(width)]), None),
        CONTEXT_HEADS: (head, head_params, (speech, text)),
        CROSS_MODAL: (fuse, cross_modal_params, (speech, text)),
        GATE_AND_LOSSES: (
            weigh,
            (gate_params, expert_logits, hidden(fusion), hidden(fusion)),
            None,
        ),
    }


def _one_scan(config: BenchmarkConfig) -> tuple[Part, Any, Any]:
    """What is recurrent in one GRU layer of both experts."""
    groups, width = 4, config.model.context_dim // 2
    steps = (config.length, groups, config.batch_size)
    key = jax.random.key(0)
    differentiated = (
        jax.random.normal(key, (*steps, 3 * width), jnp.float32),
        jax.random.normal(key, (groups, width, 3 * width), jnp.dtype(config.dtype)) / width**0.5,
        jnp.zeros((groups, width)),
    )

    def scan(differentiated, mask):
        gates, kernel, bias = differentiated
        return gru_scan(gates, mask, kernel, bias)

    return scan, differentiated, jnp.ones(steps, bool)


def _optimiser_run(config: BenchmarkConfig) -> Run:
    transformation = make_optimizer(OptimizerConfig(), total_steps=1)
    _, state = initial_state(Training(config), transformation, seed=0)
    gradient = jax.tree.map(lambda value: jnp.full_like(value, 1e-3), state["params"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, gradient):
        updates, opt_state = transformation.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    placed = state["params"], state["opt_state"]

    def step() -> Any:
        nonlocal placed
        placed = update(*placed, gradient)
        return placed

    return repeated(step)


def part_rows(config: BenchmarkConfig, peak: float) -> list[Row]:
    """Each part alone on one device, forward and backward, beside the whole training step.

    Parts are compiled apart, so they do not share what XLA would fuse; their sum is a guide to
    where the time goes, not a second measurement of the step. The backward time is the time of
    both passes without that of the forward one.

    Raises:
      InputError: more than one device.
    """
    if config.devices != 1:
        raise InputError(f"devices {config.devices}; the parts are measured on 1")
    parts = _model_parts(config)
    scan = "one of its scans"
    batch = make_batch(config.model, np.full(config.batch_size, config.length), config.length)
    runs: dict[str, Run] = {
        "training step": Ours(config).train_on(batch),
        OPTIMISER: _optimiser_run(config),
    }
    for name, part in {**parts, scan: _one_scan(config)}.items():
        runs[f"{name}: forward"], runs[f"{name}: both"] = _part_runs(*part)
    timings = {name: timing.median for name, timing in measure(runs, config.steps).items()}
    whole = timings["training step"]
    flops = model_flops(config.model, config.batch_size, config.length)

    def row(name: str, seconds: float, forward: float | None = None) -> Row:
        found: Row = {"what": name, "ms": seconds * 1e3, "share_of_step": seconds / whole}
        if forward is not None:
            found |= {"forward_ms": forward * 1e3, "backward_ms": (seconds - forward) * 1e3}
        if name in flops:
            total = sum(flops[name])
            found |= {"model_gflop": total / 1e9, "peak_share": total / seconds / peak}
        return found

    rows = []
    for name in (CONVOLUTIONS, RECURRENCE, scan, CONTEXT_HEADS, CROSS_MODAL, GATE_AND_LOSSES):
        rows.append(row(name, timings[f"{name}: both"], timings[f"{name}: forward"]))
    rows.append(row(OPTIMISER, timings[OPTIMISER]))
    summed = sum(found["ms"] for found in rows if found["what"] != scan) / 1e3
    return [*rows, row("sum of the parts", summed), row("training step", whole)]


def _part_runs(part: Part, differentiated: Any, fixed: Any) -> tuple[Run, Run]:
    """The forward pass of a part, and both passes."""

    def both(differentiated, fixed, cotangent):
        output, pull_back = jax.vjp(lambda value: part(value, fixed), differentiated)
        return output, pull_back(cotangent)

    shapes = jax.eval_shape(part, differentiated, fixed)
    cotangent = jax.tree.map(lambda shape: jnp.ones(shape.shape, shape.dtype), shapes)
    forward, both = jax.jit(part), jax.jit(both)
    return (
        repeated(lambda: forward(differentiated, fixed)),
        repeated(lambda: both(differentiated, fixed, cotangent)),
    )
