"""A masked, bidirectional, multi-layer GRU that does in its scan only what is recurrent.

The input projection of all steps is one matrix product before the scan, and the gradient of the
recurrent kernel one matrix product after it. Both directions, and GRUs of one shape over several
inputs (`run_grus`), advance in one scan.

Gates follow PyTorch (order r, z, n; the reset gate is applied after the recurrent product;
arXiv 1406.1078 with the variant of cuDNN), and both biases are kept, so its weights import as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.nn.dropout import Dropout, KeySource


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Product over the last axis within each group, in float32: [G, B, I] x [G, I, O]."""
    return jnp.einsum("gbi,gio->gbo", x, kernel, preferred_element_type=jnp.float32)


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays as they are, for `shard_map` all varying over the axes that any of them does.

    So their gradients may be taken together, of those that are the same on all devices, too.
    """
    zeros = (jnp.zeros_like(array, jnp.float32).sum() for array in arrays)
    zero = sum(zeros, start=jnp.zeros((), jnp.float32))
    return [array + zero.astype(array.dtype) for array in arrays]


def _scan(
    gates: jax.Array, mask: jax.Array, kernel: jax.Array, bias_n: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The states of all steps [T, G, B, H], and what the gradient needs of each step."""
    width = gates.shape[-1] // 3

    def step(state, inputs):
        gate, valid = inputs
        recurrent = _product(state.astype(kernel.dtype), kernel)  # G B 3H
        reset, update = jnp.split(
            jax.nn.sigmoid(gate[..., : 2 * width] + recurrent[..., : 2 * width]), 2, axis=-1
        )
        recurrent_n = recurrent[..., 2 * width :] + bias_n[:, None]
        new = jnp.tanh(gate[..., 2 * width :] + reset * recurrent_n)
        following = jnp.where(valid, new + update * (state - new), state)  # G B H
        return following, (following, state, reset, update, new, recurrent_n)

    gates = gates.astype(jnp.float32)
    start = jnp.zeros_like(gates[0, ..., :width])
    _, (states, *saved) = jax.lax.scan(step, start, (gates, mask[..., None]))
    return states, tuple(saved)


def gru_scan(gates: jax.Array, mask: jax.Array, kernel: jax.Array, bias_n: jax.Array) -> jax.Array:
    """The recurrent part of a GRU, for G independent recurrences at once.

    Where the mask is false the state is carried on unchanged.

    Args:
      gates: input projections with their biases, gate order r, z, n [T, G, B, 3H].
      mask: true where there is a step to take, [T, G, B] bool.
      kernel: recurrent kernels [G, H, 3H].
      bias_n: recurrent bias of the third gate [G, H].

    Returns:
      States after each step [T, G, B, H], float32.
    """
    gates, kernel, bias_n = _varying_alike(gates, kernel, bias_n)
    return _gru_scan(gates, mask, kernel, bias_n)


@jax.custom_vjp
def _gru_scan(gates, mask, kernel, bias_n):
    return _scan(gates, mask, kernel, bias_n)[0]


def _gru_scan_forward(gates, mask, kernel, bias_n):
    states, saved = _scan(gates, mask, kernel, bias_n)
    return states, (saved, mask, kernel, bias_n, jnp.zeros((), gates.dtype))


def _gru_scan_backward(residuals, d_states):
    saved, mask, kernel, bias_n, gates_like = residuals
    transposed = kernel.swapaxes(1, 2)  # G 3H H

    def step(d_carry, inputs):
        d_state, valid, (state, reset, update, new, recurrent_n) = inputs
        d_state = d_state + d_carry
        d_following = jnp.where(valid, d_state, 0)
        d_n = d_following * (1 - update) * (1 - new * new)
        d_z = d_following * (state - new) * update * (1 - update)
        d_r = d_n * recurrent_n * reset * (1 - reset)
        d_recurrent = jnp.concatenate([d_r, d_z, d_n * reset], axis=-1)  # G B 3H
        d_previous = _product(d_recurrent.astype(kernel.dtype), transposed)
        d_previous = d_previous + jnp.where(valid, d_following * update, d_state)
        return d_previous, (d_recurrent, d_n)

    steps = (d_states, mask[..., None], saved)
    _, (d_recurrent, d_n) = jax.lax.scan(step, jnp.zeros_like(saved[0][0]), steps, reverse=True)
    width = d_n.shape[-1]
    d_gates = jnp.concatenate([d_recurrent[..., : 2 * width], d_n], axis=-1)
    # One product over all steps: accumulating this inside the scan would read and write the whole
    # kernel at each step.
    d_kernel = jnp.einsum(
        "tgbi,tgbo->gio",
        saved[0].astype(kernel.dtype),
        d_recurrent.astype(kernel.dtype),
        preferred_element_type=jnp.float32,
    )
    d_bias = d_recurrent[..., 2 * width :].sum((0, 2))
    return (
        d_gates.astype(gates_like.dtype),
        None,
        d_kernel.astype(kernel.dtype),
        d_bias.astype(bias_n.dtype),
    )


_gru_scan.defvjp(_gru_scan_forward, _gru_scan_backward)


class GRULayer(nnx.Module):
    """The parameters of one layer: kernels and biases for each direction, gate order r, z, n.

    `input_kernel` [I, P, 3H], `recurrent_kernel` [P, H, 3H], `input_bias` and `recurrent_bias`
    [P, 3H], where P counts the directions (forward first) and I is the input's width.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        directions: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(width)

        def uniform(*shape: int) -> nnx.Param:
            value = jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)
            return nnx.Param(value)

        self.input_kernel = uniform(in_features, directions, 3 * width)
        self.recurrent_kernel = uniform(directions, width, 3 * width)
        self.input_bias = uniform(directions, 3 * width)
        self.recurrent_bias = uniform(directions, 3 * width)

    def project(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Input projections of all steps with every bias that can be added to them.

        Args:
          x: [B, T, I].
          dtype: in which the product is computed.

        Returns:
          [T, P, B, 3H], float32.
        """
        gates = jnp.einsum(
            "bti,ipo->btpo",
            x.astype(dtype),
            self.input_kernel[...].astype(dtype),
            preferred_element_type=jnp.float32,
        )
        width = self.recurrent_kernel.shape[1]
        bias = self.input_bias[...].at[:, : 2 * width].add(self.recurrent_bias[:, : 2 * width])
        return (gates + bias).transpose(1, 2, 0, 3)


class GRU(nnx.Module):
    """Multi-layer GRU over padded sequences.

    A sequence's outputs do not depend on its padding: the state does not move where the mask is
    false, so the backward direction begins at the last valid step.

    Args:
      in_features: I, width of the input.
      width: H, width of the state of one direction.
      num_layers: layers; each further one reads the outputs of the one before.
      bidirectional: run both directions and concatenate them [forward ; backward].
      dropout: rate on the inputs of all layers but the first.
      dtype: of the matrix products; the state and the gates are float32.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = True,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(in_features, width, num_layers) < 1:
            raise ValueError(
                f"GRU(in_features={in_features}, width={width}, num_layers={num_layers}): "
                "each must be at least 1"
            )
        directions = 2 if bidirectional else 1
        self.dtype = dtype
        self.dropout = Dropout(dropout)
        self.layers = nnx.List(
            GRULayer(
                in_features if layer == 0 else directions * width,
                width,
                directions,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for layer in range(num_layers)
        )

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Runs the layers.

        Args:
          x: [B, T, I].
          mask: true at valid steps, [B, T] bool.

        Returns:
          Outputs of the last layer [B, T, P * H], zero where the mask is false.
        """
        (outputs,) = run_grus((self,), (x,), mask, deterministic=deterministic, rngs=rngs)
        return outputs


def run_grus(
    grus: Sequence[GRU],
    inputs: Sequence[jax.Array],
    mask: jax.Array,
    *,
    deterministic: bool = True,
    rngs: KeySource | None = None,
) -> list[jax.Array]:
    """Runs several GRUs, each on its own input, with one scan for each layer.

    A step of one small recurrence leaves an accelerator idle; steps of all of them side by side
    are one batched matrix product.

    Args:
      grus: with the same number of layers, directions and width; input widths may differ.
      inputs: one [B, T, I] for each GRU.
      mask: true at valid steps, [B, T] bool, shared by all.

    Returns:
      For each GRU its outputs [B, T, P * H], zero where the mask is false.

    Raises:
      ValueError: the GRUs differ in more than the width of their inputs.
    """
    shapes = {tuple(layer.recurrent_kernel.shape for layer in gru.layers) for gru in grus}
    if len(shapes) != 1 or len(grus) != len(inputs):
        raise ValueError(
            f"run_grus needs one input a GRU and GRUs of one depth and width: "
            f"{len(grus)} GRUs, {len(inputs)} inputs, recurrent kernels {sorted(shapes)}"
        )
    directions = grus[0].layers[0].recurrent_kernel.shape[0]
    dtype = grus[0].dtype
    batch, time = mask.shape
    # The backward direction is a forward scan over the flipped sequence.
    steps = mask.T[:, None]  # T 1 B
    steps = jnp.concatenate([steps, steps[::-1]][:directions], axis=1)  # T P B
    steps = jnp.tile(steps, (1, len(grus), 1))  # T G B, with G = len(grus) * P

    def flip_backward(x: jax.Array) -> jax.Array:  # T P B ...
        return jnp.concatenate([x[:, :1], x[::-1, 1:]], axis=1)

    # Not only for the states: 0 times what is not finite would be NaN in the kernels' gradients.
    outputs = [jnp.where(mask[..., None], x, 0) for x in inputs]
    for depth in range(len(grus[0].layers)):
        layers = [gru.layers[depth] for gru in grus]
        if depth:
            outputs = [
                gru.dropout(x, deterministic=deterministic, rngs=rngs)
                for gru, x in zip(grus, outputs, strict=True)
            ]
        projected = [
            flip_backward(layer.project(x, dtype)) for layer, x in zip(layers, outputs, strict=True)
        ]
        kernels = [layer.recurrent_kernel[...] for layer in layers]
        width = kernels[0].shape[1]
        biases = [layer.recurrent_bias[:, 2 * width :] for layer in layers]
        states = gru_scan(
            jnp.concatenate(projected, axis=1),
            steps,
            jnp.concatenate(kernels).astype(dtype),
            jnp.concatenate(biases),
        )  # T G B H
        states = jnp.where(steps[..., None], states, 0).astype(dtype)
        outputs = [
            flip_backward(part).transpose(2, 0, 1, 3).reshape(batch, time, directions * width)
            for part in jnp.split(states, len(grus), axis=1)
        ]  # B T P*H
    return outputs
