"""Times the separately compiled parts of MiSTER-E's training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.config import BenchmarkConfig
from benchmarks.dialogues import make_batch
from benchmarks.flops import program_flops
from benchmarks.fusion import JaxMisterE, initialize
from benchmarks.measure import Run, repeated, time_runs
from benchmarks.report import Row
from mister_jax import losses
from mister_jax.errors import InputError
from mister_jax.models import EXPERTS, MisterE, MisterEOutput, apply_context_experts
from mister_jax.nn import PerExampleRngs, run_grus
from mister_jax.optim import OptimizerConfig, make_optimizer

OPTIMIZER = "optimizer"
TRAINING_STEP = "training step"


class Part(NamedTuple):
    """Part of the model, as a function of variables, which need gradients, and of constants."""

    function: Callable[[Any, Any], Any]
    variables: Any
    constants: Any = ()

    def forward_and_backward(self) -> tuple[Callable, tuple[Any, ...]]:
        """Returns a function that computes the output and all gradients, and its arguments."""

        def both(variables: Any, constants: Any, cotangent: Any) -> Any:
            output, pullback = jax.vjp(lambda value: self.function(value, constants), variables)
            return output, pullback(cotangent)

        shapes = jax.eval_shape(self.function, self.variables, self.constants)
        cotangent = jax.tree.map(lambda shape: jnp.ones(shape.shape, shape.dtype), shapes)
        return both, (self.variables, self.constants, cotangent)


def model_parts(config: BenchmarkConfig) -> dict[str, Part]:
    """Returns the differentiated parts of a training step, with inputs without padding, by name."""
    sizes, shape = config.model, (config.batch_size, config.length)
    model = MisterE(sizes, rngs=nnx.Rngs(0))
    batch = make_batch(sizes, np.full(config.batch_size, config.length), config.length)
    dtype = jnp.dtype(config.dtype)
    features = tuple(jnp.asarray(batch[name], dtype) for name in ("speech", "text"))
    mask, label = jnp.asarray(batch["mask"]), jnp.asarray(batch["label"])
    key = jax.random.key(0)

    def random(*dims: int, dtype: Any = dtype) -> jax.Array:
        return jax.random.normal(key, (*shape, *dims), dtype)

    def split(modules: Any) -> tuple[Any, Any]:
        graph, params = nnx.split(modules)
        return graph, nnx.as_pure(params)

    experts = (model.speech, model.text)
    convolution_graph, convolution_params = split([expert.convolution for expert in experts])
    gru_graph, gru_params = split([expert.gru for expert in experts])
    for expert in experts:  # Keep only the skip connection and the classifier.
        expert.convolution = expert.gru = None
    head_graph, head_params = split(experts)
    cross_modal_graph, cross_modal_params = split(model.fusion)
    gate_graph, gate_params = split(model.gate)

    def convolutions(params, features):
        layers = nnx.merge(convolution_graph, params)
        return [layer(x, mask) for layer, x in zip(layers, features, strict=True)]

    def grus(variables, _):
        params, inputs = variables
        return run_grus(nnx.merge(gru_graph, params), inputs, mask)

    def heads(params, features):
        return apply_context_experts(nnx.merge(head_graph, params), features, mask)

    def cross_modal(params, features):
        rngs = PerExampleRngs.from_batch_key(key, config.batch_size)
        expert = nnx.merge(cross_modal_graph, params)
        return expert(*features, mask, mask, deterministic=False, rngs=rngs)

    def gate_and_losses(variables, _):
        params, expert_logits, speech_repr, text_repr = variables
        present = jnp.broadcast_to(mask[..., None], expert_logits.shape[:-1])
        gate = nnx.merge(gate_graph, params)(expert_logits, present)
        output = MisterEOutput(
            logits=jnp.einsum("bte,btec->btc", gate, expert_logits),
            expert_logits=expert_logits,
            gate=gate,
            expert_present=present,
            speech_context=jnp.zeros((*shape, 0)),
            text_context=jnp.zeros((*shape, 0)),
            speech_repr=speech_repr,
            text_repr=text_repr,
            speech_present=mask,
            text_present=mask,
            experts=EXPERTS,
        )
        return losses.mister_e(output, label, mask)[0]

    hidden = [random(sizes.context_dim), random(sizes.context_dim)]
    expert_logits = random(len(EXPERTS), sizes.num_classes, dtype=jnp.float32)
    representations = (random(sizes.fusion_dim), random(sizes.fusion_dim))
    return {
        "convolutions": Part(convolutions, convolution_params, features),
        "GRU": Part(grus, (gru_params, hidden)),
        "skips, classifiers": Part(heads, head_params, features),
        "cross-modal expert": Part(cross_modal, cross_modal_params, features),
        "gate, losses": Part(gate_and_losses, (gate_params, expert_logits, *representations)),
    }


def _repeated_update(config: BenchmarkConfig) -> Run:
    """Returns a run that updates the parameters with the optimizer."""
    optimizer = make_optimizer(OptimizerConfig(), total_steps=1)
    _, state = initialize(config.model)
    gradient = jax.tree.map(lambda value: jnp.full_like(value, 1e-3), state["params"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, gradient):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    current = state["params"], state["opt_state"]

    def step() -> Any:
        nonlocal current
        current = update(*current, gradient)
        return current

    return repeated(step)


def measure_parts(config: BenchmarkConfig, peak: float) -> list[Row]:
    """Times each part's forward and backward pass, the optimizer, and the whole training step.

    XLA cannot fuse operations across separately compiled parts. Therefore, the parts' times show
    where time is spent, but do not add up to the step's time. `peak` is the result of
    `matmul_peak`.

    Raises:
      InputError: The config has more than one device.
    """
    if config.devices != 1:
        raise InputError(f"--devices={config.devices}; --parts allows 1")
    model = JaxMisterE(config)
    lengths = np.full(config.batch_size, config.length)
    (batch,) = model.put([make_batch(config.model, lengths, config.length)])
    flops: dict[str, float] = {}
    runs: dict[str, Run] = {}
    for name, part in model_parts(config).items():
        function, arguments = part.forward_and_backward()
        flops[name] = program_flops(jax.make_jaxpr(function)(*arguments).jaxpr)
        runs[name] = repeated(functools.partial(jax.jit(function), *arguments))
    runs[OPTIMIZER] = _repeated_update(config)
    names = list(runs)
    runs[TRAINING_STEP] = repeated(lambda: model.train(batch))
    seconds = {name: timing.median for name, timing in time_runs(runs, config.steps).items()}
    seconds["sum of the parts"] = sum(seconds[name] for name in names)
    rows = []
    for name, value in seconds.items():
        row: Row = {"what": name, "ms": value * 1e3}
        row["share_of_step"] = value / seconds[TRAINING_STEP]
        if name in flops:
            row |= {"model_gflop": flops[name] / 1e9, "peak_share": flops[name] / value / peak}
        rows.append(row)
    return rows
