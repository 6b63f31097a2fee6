"""Masked, bidirectional, multi-layer GRU whose scan contains only the recurrence.

The input projections of all steps are one matrix product before the scan, and the gradient of the
recurrent kernel is one matrix product after the backward scan. Both directions share one scan.
Several GRUs of the same shape can also share one scan (`run_grus`).

The gates follow PyTorch and cuDNN, so PyTorch weights only need to be transposed and stacked. The
gate order is r, z, n. The reset gate is applied after the recurrent product (a variant of arXiv
1406.1078). The input product and the recurrent product have separate biases.

States, gates and the results of matrix products are float32, or float64 if the products' dtype is
float64.

Shape letters: B dialogues, T utterances, I input size, H hidden size, P directions, G recurrences
in one scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.dtypes import at_least_float32


def gru_scan(gates: jax.Array, mask: jax.Array, kernel: jax.Array, bias_n: jax.Array) -> jax.Array:
    """Runs G independent GRU recurrences in one scan.

    Args:
      gates: Input projections with their biases, gate order r, z, n, [T, G, B, 3H].
      mask: Valid steps, [T, G, B] bool; the state does not change at other steps.
      kernel: Recurrent kernels, [G, H, 3H].
      bias_n: Recurrent biases of gate n, [G, H].

    Returns:
      States after each step, [T, G, B, H] float32.
    """
    gates, kernel, bias_n = _match_varying_axes(gates, kernel, bias_n)
    return _gru_scan(gates, mask, kernel, bias_n)


def _match_varying_axes(*arrays: jax.Array) -> list[jax.Array]:
    """Marks all arrays as different on each device if one of them is; their values do not change.

    Under `shard_map`, JAX tracks whether an array differs between devices. If a gradient differs,
    its argument must also be marked as different. The gradient of the kernel differs, because each
    device has another part of the batch, but the kernel is the same on all devices. A sum counts as
    different if one of its terms does, so a zero computed from all arrays is added to each array.
    """
    zeros = (jnp.zeros_like(array, jnp.float32).sum() for array in arrays)
    zero = sum(zeros, start=jnp.zeros((), jnp.float32))
    return [array + zero.astype(array.dtype) for array in arrays]


def _grouped_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies [G, B, I] by [G, I, O] for each of the G recurrences; returns float32."""
    dtype = at_least_float32(kernel.dtype)
    return jnp.einsum("gbi,gio->gbo", x, kernel, preferred_element_type=dtype)


def _cell(
    state: jax.Array, gate: jax.Array, kernel: jax.Array, bias_n: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Computes one step of G recurrences.

    Args:
      state: States, [G, B, H] float32.
      gate: Input projections of this step, [G, B, 3H] float32.
      kernel: Recurrent kernels, [G, H, 3H].
      bias_n: Recurrent biases of gate n, [G, H].

    Returns:
      The new states, and the reset gate, the update gate, the candidate and the candidate's
      recurrent product, each [G, B, H].
    """
    hidden_dim = state.shape[-1]
    recurrent = _grouped_matmul(state.astype(kernel.dtype), kernel)  # G B 3H
    reset, update = jnp.split(
        jax.nn.sigmoid(gate[..., : 2 * hidden_dim] + recurrent[..., : 2 * hidden_dim]),
        2,
        axis=-1,
    )
    recurrent_n = recurrent[..., 2 * hidden_dim :] + bias_n[:, None].astype(recurrent.dtype)
    new = jnp.tanh(gate[..., 2 * hidden_dim :] + reset * recurrent_n)
    return new + update * (state - new), (reset, update, new, recurrent_n)


def _scan(
    gates: jax.Array, mask: jax.Array, kernel: jax.Array, bias_n: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the states of all steps, [T, G, B, H], and the residuals for the backward pass."""

    def step(state, inputs):
        gate, valid = inputs
        new_state, residuals = _cell(state, gate, kernel, bias_n)
        next_state = jnp.where(valid, new_state, state)  # G B H
        return next_state, (next_state, state, *residuals)

    gates = gates.astype(at_least_float32(kernel.dtype))
    initial_state = jnp.zeros_like(gates[0, ..., : gates.shape[-1] // 3])
    _, (states, *residuals) = jax.lax.scan(step, initial_state, (gates, mask[..., None]))
    return states, tuple(residuals)


def _explicit_sharding(x: jax.Array) -> jax.sharding.NamedSharding | None:
    """Returns the sharding of an array on a mesh with explicit axes, otherwise None."""
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes else None


@jax.custom_vjp
def _gru_scan(gates, mask, kernel, bias_n):
    return _scan(gates, mask, kernel, bias_n)[0]


def _gru_scan_forward(gates, mask, kernel, bias_n):
    states, residuals = _scan(gates, mask, kernel, bias_n)
    return states, (residuals, mask, kernel, bias_n, jnp.zeros((), gates.dtype))


def _gru_scan_backward(saved, d_states):
    residuals, mask, kernel, bias_n, gates_like = saved
    transposed = kernel.swapaxes(1, 2)  # G 3H H

    def step(d_carry, inputs):
        d_state, valid, (state, reset, update, new, recurrent_n) = inputs
        d_state = d_state + d_carry
        d_next = jnp.where(valid, d_state, 0)
        d_n = d_next * (1 - update) * (1 - new * new)
        d_z = d_next * (state - new) * update * (1 - update)
        d_r = d_n * recurrent_n * reset * (1 - reset)
        d_recurrent = jnp.concatenate([d_r, d_z, d_n * reset], axis=-1)  # G B 3H
        d_previous = _grouped_matmul(d_recurrent.astype(kernel.dtype), transposed)
        d_previous = d_previous + jnp.where(valid, d_next * update, d_state)
        return d_previous, (d_recurrent, d_n)

    inputs = (d_states, mask[..., None], residuals)
    no_gradient = jnp.zeros_like(residuals[0][0])
    _, (d_recurrent, d_n) = jax.lax.scan(step, no_gradient, inputs, reverse=True)
    hidden_dim = d_n.shape[-1]
    d_gates = jnp.concatenate([d_recurrent[..., : 2 * hidden_dim], d_n], axis=-1)
    # This is one product over all steps. If the scan accumulated the kernel gradient, every step
    # would read and write the whole gradient.
    d_kernel = jnp.einsum(
        "tgbi,tgbo->gio",
        residuals[0].astype(kernel.dtype),
        d_recurrent.astype(kernel.dtype),
        preferred_element_type=at_least_float32(kernel.dtype),
        # On meshes with explicit axes, JAX does not choose the sharding of a sum over sharded rows.
        out_sharding=_explicit_sharding(kernel),
    )
    d_bias_n = d_recurrent[..., 2 * hidden_dim :].sum((0, 2))
    return (
        d_gates.astype(gates_like.dtype),
        None,
        d_kernel.astype(kernel.dtype),
        d_bias_n.astype(bias_n.dtype),
    )


_gru_scan.defvjp(_gru_scan_forward, _gru_scan_backward)


class GRULayer(nnx.Module):
    """Parameters of one GRU layer, with gate order r, z, n and the forward direction first.

    Attributes:
      input_kernel: Input kernel, [I, P, 3H].
      recurrent_kernel: Recurrent kernel, [P, H, 3H].
      input_bias: Bias of the input projection, [P, 3H].
      recurrent_bias: Bias of the recurrent product, [P, 3H].

    Args:
      in_dim: Input size I.
      hidden_dim: Hidden size H of one direction.
      directions: Number of directions P.
      param_dtype: Parameter dtype.
      rngs: RNGs for parameter initialization.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        directions: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(hidden_dim)

        def uniform(*shape: int) -> nnx.Param:
            value = jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)
            return nnx.Param(value)

        self.input_kernel = uniform(in_dim, directions, 3 * hidden_dim)
        self.recurrent_kernel = uniform(directions, hidden_dim, 3 * hidden_dim)
        self.input_bias = uniform(directions, 3 * hidden_dim)
        self.recurrent_bias = uniform(directions, 3 * hidden_dim)

    def project(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Projects the inputs of all steps and adds all biases that the reset gate does not scale.

        Args:
          x: Input, [B, T, I].
          dtype: Dtype of the matrix product.

        Returns:
          Input projections, [T, P, B, 3H] float32.
        """
        gates = jnp.einsum(
            "bti,ipo->btpo",
            x.astype(dtype),
            self.input_kernel[...].astype(dtype),
            preferred_element_type=at_least_float32(dtype),
        )
        split = 2 * self.recurrent_kernel.shape[1]
        bias = self.input_bias[...].at[:, :split].add(self.recurrent_bias[:, :split])
        return (gates + bias.astype(gates.dtype)).transpose(1, 2, 0, 3)

    def step(self, state: jax.Array, x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Computes the next step of the forward direction.

        Args:
          state: State after the previous step, [B, H] float32.
          x: Input of this step, [B, I].
          dtype: Dtype of the matrix products.

        Returns:
          The new state, and the output, [B, H].
        """
        (gate,) = self.project(x[:, None], dtype)  # 1 B 3H
        kernel = self.recurrent_kernel[...].astype(dtype)
        bias_n = self.recurrent_bias[:, 2 * state.shape[-1] :]
        (new_state,), _ = _cell(state[None], gate, kernel, bias_n)
        return new_state, new_state.astype(dtype)


class GRU(nnx.Module):
    """Multi-layer GRU over padded sequences.

    Padding does not change the outputs: the state stays zero until the first valid step of a
    direction, and does not change where the mask is False.

    Reverse-mode differentiation (`jax.grad`, `jax.vjp`, also nested) is supported. Forward-mode
    differentiation (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) is not, because the backward pass is a
    `jax.custom_vjp`.

    Args:
      in_dim: Input size I.
      hidden_dim: Hidden size H of one direction.
      num_layers: Number of layers.
      bidirectional: Whether to run both directions and concatenate their outputs, with the forward
        direction first.
      dropout: Dropout rate on the inputs of all layers except the first.
      dtype: Dtype of the matrix products; the state and the gates are float32.
      param_dtype: Parameter dtype.
      rngs: RNGs for parameter initialization.

    Raises:
      ValueError: A size is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = True,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(in_dim, hidden_dim, num_layers) < 1:
            raise ValueError(
                f"GRU(in_dim={in_dim}, hidden_dim={hidden_dim}, num_layers={num_layers}): "
                "each must be at least 1"
            )
        directions = 2 if bidirectional else 1
        self.dtype = dtype
        self.dropout = Dropout(dropout)
        self.layers = nnx.List(
            GRULayer(
                in_dim if layer == 0 else directions * hidden_dim,
                hidden_dim,
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
          x: Input, [B, T, I].
          mask: Valid steps, [B, T] bool.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.

        Returns:
          Outputs of the last layer, [B, T, P * H]; zero where the mask is False.
        """
        (outputs,) = run_grus((self,), (x,), mask, deterministic=deterministic, rngs=rngs)
        return outputs

    def initial_state(self, batch_size: int) -> list[jax.Array]:
        """Returns the state before the first `step`: one array [B, H] per layer.

        Raises:
          ValueError: The GRU is bidirectional.
        """
        directions, hidden_dim, _ = self.layers[0].recurrent_kernel.shape
        if directions > 1:
            raise ValueError("bidirectional=True; steps need a GRU with one direction")
        dtype = at_least_float32(self.dtype)
        return [jnp.zeros((batch_size, hidden_dim), dtype) for _ in self.layers]

    def step(self, state: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Runs the layers for the next step.

        Args:
          state: State after the previous step.
          x: Input of this step, [B, I].

        Returns:
          The new state, and the output of the last layer, [B, H].
        """
        new_state = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            layer_state, x = layer.step(layer_state, x, self.dtype)
            new_state.append(layer_state)
        return new_state, x


def run_grus(
    grus: Sequence[GRU],
    inputs: Sequence[jax.Array],
    mask: jax.Array,
    *,
    deterministic: bool = True,
    rngs: KeySource | None = None,
) -> list[jax.Array]:
    """Runs several GRUs on separate inputs, with one scan per layer.

    One step of a small GRU leaves an accelerator mostly idle. This function computes one step of
    all GRUs as a single batched matrix product.

    Args:
      grus: GRUs with the same number of layers, directions, hidden size and dtype.
      inputs: One input per GRU, [B, T, I]; the input sizes may differ.
      mask: Valid steps of all inputs, [B, T] bool.
      deterministic: Whether to disable dropout.
      rngs: Source of dropout keys.

    Returns:
      Outputs of each GRU, [B, T, P * H]; zero where the mask is False.

    Raises:
      ValueError: The GRUs differ in depth, directions, hidden size or dtype, or there is not one
        input per GRU.
    """
    shapes = {tuple(layer.recurrent_kernel.shape for layer in gru.layers) for gru in grus}
    if len(shapes) != 1 or len(grus) != len(inputs):
        raise ValueError(
            "run_grus needs one input per GRU and GRUs of the same depth and hidden size, got "
            f"{len(grus)} GRUs, {len(inputs)} inputs and recurrent kernels {sorted(shapes)}"
        )
    dtypes = {jax.dtypes.canonicalize_dtype(gru.dtype).name for gru in grus}
    if len(dtypes) > 1:
        raise ValueError(
            f"run_grus got GRUs of dtypes {', '.join(sorted(dtypes))}; allowed: one dtype"
        )
    directions, hidden_dim, _ = grus[0].layers[0].recurrent_kernel.shape
    dtype = grus[0].dtype
    batch, time = mask.shape
    # The backward direction is a forward scan over the reversed sequence.
    step_mask = mask.T[:, None]  # T 1 B
    step_mask = jnp.concatenate([step_mask, step_mask[::-1]][:directions], axis=1)  # T P B
    step_mask = jnp.tile(step_mask, (1, len(grus), 1))  # T G B, with G = len(grus) * P

    def reverse_backward(x: jax.Array) -> jax.Array:  # T P B ...
        return jnp.concatenate([x[:, :1], x[::-1, 1:]], axis=1)

    # The scan ignores padding, but NaN in padding would reach the gradients of the input kernels.
    outputs = [jnp.where(mask[..., None], x, 0) for x in inputs]
    for depth in range(len(grus[0].layers)):
        layers = [gru.layers[depth] for gru in grus]
        if depth:
            outputs = [
                gru.dropout(x, deterministic=deterministic, rngs=rngs)
                for gru, x in zip(grus, outputs, strict=True)
            ]
        gates = [
            reverse_backward(layer.project(x, dtype))
            for layer, x in zip(layers, outputs, strict=True)
        ]
        kernels = [layer.recurrent_kernel[...] for layer in layers]
        biases_n = [layer.recurrent_bias[:, 2 * hidden_dim :] for layer in layers]
        states = gru_scan(
            jnp.concatenate(gates, axis=1),
            step_mask,
            jnp.concatenate(kernels).astype(dtype),
            jnp.concatenate(biases_n),
        )  # T G B H
        states = jnp.where(step_mask[..., None], states, 0).astype(dtype)
        outputs = [
            reverse_backward(part)
            .transpose(2, 0, 1, 3)
            .reshape(batch, time, directions * hidden_dim)
            for part in jnp.split(states, len(grus), axis=1)
        ]  # B T P*H
    return outputs
